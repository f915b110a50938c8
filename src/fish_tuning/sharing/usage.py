"""How an adapter is loaded, as its card tells it: with stock PEFT, and with this package."""

from __future__ import annotations

from typing import Any

from fish_tuning.files.delta_file import DELTA_FILE_NAME
from fish_tuning.sharing.tasks import task_kind, task_type

_AUTO_CLASSES = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    None: "AutoPeftModel",
}
OWN_METHODS = ("SERIAL_ADAPTER", "UNIPELT")
_FOLDER = 'folder = "..."  # this folder, or its name on the hub'


def usage(base: Any, config: Any, *, masked: bool) -> str:
    """Markdown with the calls that load the adapter on a model like `base`; `config` is None for a delta."""
    if config is None:
        name = type(base).__name__
        return _python(
            f"from transformers import AutoConfig, {name}",
            "from fish_tuning import add_delta",
            "",
            _FOLDER.partition(",")[0],
            'config = AutoConfig.from_pretrained(f"{folder}/model_config")',
            f"model = {name}.from_pretrained(base_model, config=config)",
            'add_delta(model, f"{folder}/DELTA")'.replace("DELTA", DELTA_FILE_NAME),
        )
    stock, ours = _with_peft(base, config), _with_fish_tuning(masked)
    return f"With PEFT alone:\n\n{stock}\n\nWith fish-tuning, which finds labels and base model by itself:\n\n{ours}"


def _with_peft(base: Any, config: Any) -> str:
    labelled = bool(getattr(getattr(base, "config", None), "id2label", None)) and _classifies(base)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    auto_class = _AUTO_CLASSES.get(task_type(base, config), "AutoPeftModel")
    lines = ["import fish_tuning.adapters  # makes PEFT know the method"] if kind in OWN_METHODS else []
    lines.append(f"from peft import {auto_class}")
    lines += ["from transformers import AutoConfig"] if labelled else []
    lines += ["", _FOLDER]
    if labelled:
        lines += [
            'labels = AutoConfig.from_pretrained(folder, subfolder="model_config").id2label',
            f"model = {auto_class}.from_pretrained(folder, id2label=labels)",
        ]
    else:
        lines.append(f"model = {auto_class}.from_pretrained(folder)")
    return _python(*lines)


def _with_fish_tuning(masked: bool) -> str:
    goes_on = ["model = load_adapter(folder, is_trainable=True)  # to train it further, with the same mask"]
    return _python(
        "from fish_tuning import load_adapter",
        "",
        _FOLDER,
        "model = load_adapter(folder)",
        *(goes_on if masked else []),
    )


def _classifies(base: Any) -> bool:
    kind = task_kind(base)
    return kind is not None and kind.pipeline_tag.endswith("classification")


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])
