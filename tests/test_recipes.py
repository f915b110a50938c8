"""The scripts in examples/ run as they stand, with local folders under the hub's names; the page quotes them."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from folders import WORDS, write_bert, write_llama, write_sentences
from peft import PeftModel
from tiny import Rows, causal_batch, llama, lora, tensors
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from fish_tuning import ConfigurationError, get_mask, load_mask

EXAMPLES = Path(__file__).parents[1] / "examples"
PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
ANSWERS = [" ".join([WORDS[number % 4], *WORDS[8 : 10 + number % 3]]) for number in range(16)]
OTHERS = [" ".join(WORDS[4 + number % 4 : 9]) for number in range(16)]


def said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def capybara() -> dict[str, Any]:
    return {"messages": [said("film", answer) for answer in ANSWERS]}


def ultrafeedback() -> dict[str, Any]:
    return {
        "chosen": [said("film", answer) for answer in ANSWERS],
        "rejected": [said("film", other) for other in OTHERS],
    }


def tldr() -> dict[str, Any]:
    return {"prompt": ANSWERS, "completion": OTHERS}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, where what the scripts name lies as on the hub; training on the CPU, for a few steps."""
    monkeypatch.chdir(tmp_path)
    original = TrainingArguments.__post_init__

    def on_the_cpu(self: TrainingArguments) -> None:
        self.use_cpu, self.bf16, self.max_steps, self.disable_tqdm = True, False, 3, True
        if hasattr(self, "max_completion_length"):
            self.max_completion_length = 8
        original(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_the_cpu)
    write_llama(tmp_path / "Qwen" / "Qwen3-0.6B", chat=True)
    write_bert(tmp_path / "roberta-base")
    write_sentences(tmp_path / "rotten_tomatoes")
    for name, make in {"Capybara": capybara, "ultrafeedback_binarized": ultrafeedback, "tldr": tldr}.items():
        folder = tmp_path / "trl-lib" / name
        folder.mkdir(parents=True)
        Dataset.from_dict(make()).to_parquet(folder / "train.parquet")
    return tmp_path


def run(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize(
    ("name", "kept"), [("sft", 0.25), ("dpo", 0.25), ("reward", 0.25), ("grpo", 0.25), ("one_call", 0.05)]
)
def test_a_trainers_script(name: str, kept: float, hub: Path) -> None:
    if name != "one_call":
        pytest.importorskip("trl", reason="needs trl: pip install 'fish-tuning[trl]'")
    trainer = run(f"{name}.py")["trainer"]
    assert trainer.state.global_step == 3
    mask = load_mask(hub / "output" / name / "fish_mask.safetensors")
    pool = {tensor: selected for tensor, selected in mask.items() if "modules_to_save" not in tensor}
    assert sum(int(selected.sum()) for selected in pool.values()) == round(
        kept * sum(selected.numel() for selected in pool.values())
    )
    assert all(selected.all() for tensor, selected in mask.items() if "modules_to_save" in tensor)
    assert mask.keys() == get_mask(trainer.model).keys()
    # Whoever has PEFT alone gets the model that was trained.
    ids = torch.arange(5, 12)[None]
    kind, folder = (
        (AutoModelForSequenceClassification, "roberta-base" if name == "one_call" else "Qwen/Qwen3-0.6B")
        if len(pool) < len(mask)
        else (AutoModelForCausalLM, "Qwen/Qwen3-0.6B")
    )
    labels = {"num_labels": trainer.model.config.num_labels} if len(pool) < len(mask) else {}
    base = kind.from_pretrained(hub / folder, dtype=trainer.model.dtype, **labels)
    loaded = PeftModel.from_pretrained(base, hub / "output" / name).eval()
    assert torch.equal(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


def test_the_accelerate_loop(hub: Path) -> None:
    model = run("accelerate_loop.py")["model"]
    mask = load_mask(hub / "output" / "accelerate_loop" / "fish_mask.safetensors")
    pool = {name: selected for name, selected in mask.items() if "classifier" not in name}
    share = sum(int(each.sum()) for each in pool.values()) / sum(each.numel() for each in pool.values())
    assert share == pytest.approx(0.05, abs=1e-3)
    base = AutoModelForSequenceClassification.from_pretrained("roberta-base", num_labels=2)
    start = tensors(base)
    loaded = PeftModel.from_pretrained(base, "output/accelerate_loop").eval()
    ids = torch.arange(5, 12)[None]
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    weight = loaded.get_parameter("base_model.model.classifier.modules_to_save.default.weight")
    assert not torch.equal(weight, start["classifier.weight"])


# Tools that are not installed: a stand-in has the names that the scripts use, as the tools' own sources have them


def stand_in(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, Any]) -> None:
    for name, contents in modules.items():
        module = ModuleType(name.replace("__", "."))
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def causal_trainer(kind: type[Trainer], folder: Path, **settings: Any) -> Trainer:
    args = TrainingArguments(
        str(folder), max_steps=2, save_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    vars(args).update(settings)
    return kind(lora(llama(), init_lora_weights=True), args, train_dataset=Rows(causal_batch()))


def test_the_axolotl_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class BasePlugin:
        def get_input_args(self) -> str | None: ...
        def post_trainer_create(self, cfg: Any, trainer: Any) -> None: ...

    resumed: list[str] = []
    stand_in(
        monkeypatch,
        axolotl={},
        axolotl__integrations={},
        axolotl__integrations__base={"BasePlugin": BasePlugin},
        axolotl__utils={},
        axolotl__utils__train={"determine_last_checkpoint": lambda cfg: resumed[-1] if resumed else None},
    )
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("axolotl_plugin")
    plugin = module.FishTuningPlugin()
    package, _, name = plugin.get_input_args().rpartition(".")
    cfg = getattr(importlib.import_module(package), name)().model_dump()
    trainer = causal_trainer(Trainer, tmp_path, sample_packing=False)
    plugin.post_trainer_create(cfg, trainer)
    trainer.train()
    mask = get_mask(trainer.model)
    assert sum(int(each.sum()) for each in mask.values()) == round(0.25 * sum(each.numel() for each in mask.values()))
    with pytest.raises(ConfigurationError, match="sample_packing=True puts several examples into one row"):
        plugin.post_trainer_create(cfg, causal_trainer(Trainer, tmp_path, sample_packing=True))
    # Where axolotl resumes, the checkpoint's mask is trained on with, whatever the keys now ask for.
    resumed.append(str(tmp_path / "checkpoint-1"))
    again = causal_trainer(Trainer, tmp_path, sample_packing=False)
    plugin.post_trainer_create({**cfg, "fish_keep_ratio": 0.5}, again)
    again.train(resume_from_checkpoint=resumed[-1])
    assert all(torch.equal(get_mask(again.model)[name], mask[name]) for name in mask)
    assert equal(tensors(again.model), tensors(trainer.model))
    monkeypatch.delitem(sys.modules, "axolotl_plugin")


def test_the_llama_factory_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class CustomSeq2SeqTrainer(Trainer):
        pass

    made: list[Trainer] = []
    resumed: list[str | None] = [None]

    def run_exp(callbacks: list[Any]) -> None:  # looks the Trainer up where the workflow does
        made.append(causal_trainer(sys.modules["llamafactory.train.sft.workflow"].CustomSeq2SeqTrainer, tmp_path))
        for callback in callbacks:
            made[-1].add_callback(callback)
        made[-1].train(resume_from_checkpoint=resumed[-1])

    sft: dict[str, Any] = {}
    workflow = {"CustomSeq2SeqTrainer": CustomSeq2SeqTrainer}
    stand_in(
        monkeypatch,
        llamafactory={},
        llamafactory__train={},
        llamafactory__train__sft=sft,
        llamafactory__train__sft__workflow=workflow,
        llamafactory__train__tuner={"run_exp": run_exp},
    )
    package: Any = sys.modules["llamafactory.train.sft"]
    package.workflow = sys.modules["llamafactory.train.sft.workflow"]
    script = run("llama_factory.py")
    mask = get_mask(made[0].model)
    assert made[0].state.global_step == 2
    assert sum(int(each.sum()) for each in mask.values()) == round(0.25 * sum(each.numel() for each in mask.values()))
    # Resumed, it scores nothing and goes on with the checkpoint's mask, to the same end.
    resumed.append(str(tmp_path / "checkpoint-1"))
    monkeypatch.setitem(script["MaskedTrainer"].train.__globals__, "calculate_fisher_information", None)
    run_exp(callbacks=[script["MaskedOnly"]()])
    assert equal(tensors(made[1].model), tensors(made[0].model))
    # Another stage's Trainer is another class.
    other = causal_trainer(Trainer, tmp_path)
    other.add_callback(script["MaskedOnly"]())
    with pytest.raises(SystemExit, match="this stage has a Trainer of its own"):
        other.train()


def test_the_page_quotes_the_scripts_that_are_run() -> None:
    text = PAGE.read_text()
    scripts = {path.name: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert set(re.findall(r"examples/(\w+\.py)", text)) == set(scripts)
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= len(scripts)
    for block in blocks + re.findall(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        assert any(block in script for script in scripts.values()), block
    assert set(re.findall(r"notebooks/(\w+\.ipynb)", text)) == {path.name for path in EXAMPLES.glob("**/*.ipynb")}
