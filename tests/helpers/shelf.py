"""Every PEFT method on a tiny model: what the tests walk, and the table in docs/peft-methods.md that they prove.

`python tests/helpers/shelf.py` writes the table.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny import (
    PAD,
    VOCABULARY,
    Batch,
    bert,
    causal_batch,
    classification_batch,
    image_batch,
    llama,
    lora,
    vit,
)
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from fish_tuning import MaskError, calculate_fisher_information

DOCUMENT = Path(__file__).parents[2] / "docs/peft-methods.md"
HEAD = "modules_to_save"  # in the names of what PEFT trains and saves as a whole


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).eval()


class Base(NamedTuple):
    make: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    task_type: str | None


BASES = {
    "BERT": Base(bert, classification_batch, "SEQ_CLS"),
    "Llama": Base(lambda: llama(use_cache=False), causal_batch, "CAUSAL_LM"),
    "Llama, tied": Base(lambda: llama(tie_word_embeddings=True), causal_batch, "CAUSAL_LM"),
    "GPT-2": Base(gpt2, causal_batch, "CAUSAL_LM"),
    "ViT": Base(vit, image_batch, None),
}

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """An adapter as PEFT builds it on a tiny model."""

    peft_type: str
    base: str
    settings: Settings | Callable[[Path], Settings]  # given a folder where the method needs files
    remark: str = ""
    inputs: Batch = field(default_factory=dict)  # beside the base's batch
    first: Settings | None = None  # a LoRA that is there before, and inactive


@dataclass(frozen=True)
class Case(Method):
    """A method that can be masked."""

    reload: str = "yes"  # "to rounding" and "no" are limits of PEFT, for unmasked adapters too; the remark tells why
    silent: str = "no tensor"  # regular expression: tensors that the loss does not depend on


@dataclass(frozen=True)
class Refusal(Method):
    """A method that cannot; the remark says why."""

    by: str = "`apply_mask`"
    error: type[Exception] = MaskError
    message: str = "is shared by several layers"


def xlora_experts(folder: Path) -> Settings:
    for seed in (0, 1):
        lora(llama(), seed=seed).save_pretrained(folder / f"expert{seed}")
    return {"hidden_size": 16, "adapters": {str(seed): str(folder / f"expert{seed}") for seed in (0, 1)}}


BERT_QV = {"target_modules": ["query", "value"]}
LLAMA_QV = {"target_modules": ["q_proj", "v_proj"]}
LORA = {"r": 4, "init_lora_weights": False}
VIRTUAL = {"num_virtual_tokens": 3}
P_TUNING = VIRTUAL | {"encoder_hidden_size": 8}
TASKS = {"task_ids": torch.tensor([0, 1, 1, 0])}
SAVED_PROMPT = "PEFT saves the computed prompt, not what computes it."

CASES = {
    "LoRA": Case("LORA", "BERT", BERT_QV | LORA),
    "LoRA, rsLoRA": Case("LORA", "Llama", LLAMA_QV | LORA | {"use_rslora": True}),
    "LoRA, DoRA": Case("LORA", "BERT", BERT_QV | LORA | {"use_dora": True}),
    "LoRA, PiSSA": Case("LORA", "BERT", BERT_QV | {"r": 4, "init_lora_weights": "pissa"}),
    "LoRA, OLoRA": Case("LORA", "Llama", LLAMA_QV | {"r": 4, "init_lora_weights": "olora"}),
    "LoRA, `lora_bias`": Case("LORA", "BERT", BERT_QV | LORA | {"lora_bias": True}),
    'LoRA, `bias="all"`': Case("LORA", "BERT", BERT_QV | LORA | {"bias": "all"}),
    "LoRA, `modules_to_save`": Case("LORA", "BERT", BERT_QV | LORA | {"modules_to_save": ["pooler"]}),
    "LoRA, `trainable_token_indices`": Case(
        "LORA", "BERT", BERT_QV | LORA | {"trainable_token_indices": {"word_embeddings": [3, 4, 7]}}
    ),
    "LoRA, `target_parameters`": Case(
        "LORA", "Llama", LORA | {"target_modules": ["q_proj"], "target_parameters": ["down_proj.weight"]}
    ),
    "LoRA, `layers_to_transform`": Case("LORA", "Llama", LLAMA_QV | LORA | {"layers_to_transform": [1]}),
    "LoRA, `layer_replication`": Case("LORA", "Llama", LLAMA_QV | LORA | {"layer_replication": [[0, 2], [0, 2]]}),
    "LoRA, `rank_pattern`": Case(
        "LORA", "Llama", LLAMA_QV | LORA | {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    ),
    "LoRA, activated (aLoRA)": Case("LORA", "Llama", LLAMA_QV | LORA | {"alora_invocation_tokens": [3]}),
    "LoRA on embeddings": Case("LORA", "BERT", LORA | {"target_modules": ["query", "word_embeddings"]}),
    "LoRA on tied embeddings": Case("LORA", "Llama, tied", LORA | {"target_modules": ["q_proj", "embed_tokens"]}),
    "LoRA on Conv2d": Case("LORA", "ViT", LORA | {"target_modules": ["projection"], "modules_to_save": ["classifier"]}),
    "LoRA, DoRA on Conv2d": Case("LORA", "ViT", LORA | {"target_modules": ["projection"], "use_dora": True}),
    "LoRA on GPT-2's Conv1D": Case(
        "LORA", "GPT-2", LORA | {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    ),
    "LoRA, second of two adapters": Case(
        "LORA",
        "BERT",
        BERT_QV | LORA,
        "Only the active adapter is scored, masked and trained.",
        first={"target_modules": ["query", "key"], "r": 2},
    ),
    "AdaMSS": Case("ADAMSS", "BERT", BERT_QV | {"r": 4, "num_subspaces": 2}),
    "Adaption prompt": Case("ADAPTION_PROMPT", "Llama", {"adapter_len": 3, "adapter_layers": 2}),
    "BEFT": Case("BEFT", "BERT", BERT_QV),
    "Bone": Case("BONE", "BERT", BERT_QV | {"r": 2}),
    "BOFT": Case("BOFT", "BERT", BERT_QV | {"boft_block_size": 4}),
    "C3A": Case("C3A", "BERT", BERT_QV | {"block_size": 4}),
    "Cartridge": Case("CARTRIDGE", "Llama", VIRTUAL),
    "DEFT": Case("DEFT", "BERT", BERT_QV | {"r": 2}),
    "DeLoRA": Case("DELORA", "BERT", BERT_QV | {"r": 2}),
    "FourierFT": Case("FOURIERFT", "BERT", BERT_QV | {"n_frequency": 20}),
    "FRoD": Case("FROD", "BERT", BERT_QV | {"progressbar": False}),
    "GLoRA": Case("GLORA", "BERT", BERT_QV | {"r": 2}),
    "GraLoRA": Case("GRALORA", "BERT", BERT_QV | {"r": 4}),
    "HiRA": Case("HIRA", "BERT", BERT_QV | {"r": 2}),
    "HRA": Case("HRA", "BERT", BERT_QV | {"r": 2}),
    "(IA)³": Case("IA3", "BERT", {"target_modules": ["value", "dense"], "feedforward_modules": ["dense"]}),
    "(IA)³ on GPT-2's Conv1D": Case(
        "IA3", "GPT-2", {"target_modules": ["c_attn", "c_proj"], "feedforward_modules": ["c_proj"]}
    ),
    "LayerNorm tuning": Case("LN_TUNING", "BERT", {"target_modules": ["LayerNorm"]}),
    "LoHa": Case("LOHA", "BERT", BERT_QV | {"r": 2}),
    "LoHa on Conv2d": Case("LOHA", "ViT", {"target_modules": ["projection"], "r": 2}),
    "LoKr": Case("LOKR", "BERT", BERT_QV | {"r": 2}),
    "MiSS": Case("MISS", "BERT", BERT_QV | {"r": 2}),
    "Multitask prompt tuning": Case(
        "MULTITASK_PROMPT_TUNING", "Llama", VIRTUAL | {"num_tasks": 2}, "Batches carry `task_ids`.", TASKS
    ),
    "OFT": Case("OFT", "BERT", BERT_QV | {"oft_block_size": 4}),
    "P-tuning": Case("P_TUNING", "Llama", P_TUNING, SAVED_PROMPT),
    "P-tuning, LSTM": Case("P_TUNING", "BERT", P_TUNING | {"encoder_reparameterization_type": "LSTM"}, SAVED_PROMPT),
    "PEANuT": Case("PEANUT", "BERT", BERT_QV | {"r": 2}),
    "Poly": Case("POLY", "BERT", BERT_QV | {"r": 2, "n_tasks": 2, "n_skills": 2}, "Batches carry `task_ids`.", TASKS),
    "Prefix tuning": Case("PREFIX_TUNING", "Llama", VIRTUAL),
    "Prefix tuning, classifier": Case("PREFIX_TUNING", "BERT", VIRTUAL),
    "Prefix tuning, projection": Case(
        "PREFIX_TUNING", "Llama", P_TUNING | {"prefix_projection": True}, SAVED_PROMPT, reload="to rounding"
    ),
    "Prompt tuning": Case("PROMPT_TUNING", "Llama", VIRTUAL),
    "Prompt tuning, classifier": Case("PROMPT_TUNING", "BERT", VIRTUAL),
    "PSOFT": Case("PSOFT", "BERT", BERT_QV | {"r": 4}),
    "PVeRA": Case("PVERA", "BERT", BERT_QV | {"r": 4}, "Scored without the noise that it trains with."),
    "RandLoRA": Case("RANDLORA", "BERT", BERT_QV | {"r": 4}),
    "RoAd": Case("ROAD", "BERT", BERT_QV | {"group_size": 4}),
    "Shadow": Case(
        "SHADOW",
        "Llama",
        {"r": 2, "auxiliary_loss_weight": 0.0},
        "Its auxiliary loss is not scored. What it updates after the last layer has no gradient without it.",
        silent=r"layers\.1\.shadow_update",
    ),
    "SHiRA": Case("SHIRA", "BERT", BERT_QV | {"r": 2}),
    "SuperTuning": Case("SUPERTUNING", "BERT", BERT_QV | {"sparsity": 0.8}),
    "Trainable tokens": Case(
        "TRAINABLE_TOKENS", "BERT", {"token_indices": [3, 4, 7], "target_modules": ["word_embeddings"]}
    ),
    "VeRA": Case("VERA", "BERT", BERT_QV | {"r": 4}),
    "WaveFT": Case("WAVEFT", "BERT", BERT_QV | {"n_frequency": 20}),
    "LoRA, `modules_to_save` of tied embeddings": Case(
        "LORA",
        "Llama, tied",
        LLAMA_QV | LORA | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "LoRA, `trainable_token_indices` of tied embeddings": Case(
        "LORA", "Llama, tied", LLAMA_QV | LORA | {"trainable_token_indices": [3, 4]}
    ),
    "Uni-LoRA": Case("UNILORA", "BERT", BERT_QV | {"r": 2, "theta_d_length": 16}),
    "VB-LoRA": Case("VBLORA", "BERT", BERT_QV | {"r": 2, "num_vectors": 6, "vector_length": 4}),
    "X-LoRA": Case(
        "XLORA",
        "Llama",
        xlora_experts,
        "PEFT 0.21 does not save X-LoRA's classifier, masked or not; 0.18 does.",
        reload="no",
    ),
}

REFUSALS = {
    "AdaLoRA": Refusal(
        "ADALORA",
        "BERT",
        BERT_QV | {"total_step": 10},
        "It prunes its tensors itself, and its loss needs them whole.",
        message="AdaLoRA.*cannot be masked",
    ),
    "CPT": Refusal(
        "CPT",
        "Llama",
        {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
        "It rescales its whole tensor at every step, frozen entries included.",
        message="gradient hook",
    ),
    "Lily": Refusal(
        "LILY",
        "BERT",
        BERT_QV | {"r": 2},
        "Its router averages over the batch, so no example has a loss of its own. Scoring refuses it too.",
        message="Lily's router averages over the batch",
    ),
    "OSF": Refusal(
        "OSF",
        "BERT",
        BERT_QV,
        "It projects the gradient of a whole tensor, which single entries cannot follow.",
        message="gradient hook",
    ),
    "TinyLoRA": Refusal(
        "TINYLORA",
        "BERT",
        BERT_QV | {"r": 2, "u": 4},
        "Its layers share their vectors and reach them past their modules.",
        message="TinyLoRA keeps references",
    ),
    "Adaption prompt on BERT": Refusal(
        "ADAPTION_PROMPT",
        "BERT",
        {"adapter_len": 3, "adapter_layers": 2},
        "Made for Llama, Mistral and GPT-2.",
        by="PEFT",
        error=ValueError,
        message="Unsupported model type",
    ),
    "Shadow on BERT": Refusal(
        "SHADOW", "BERT", {"r": 2}, "Made for decoders.", by="PEFT", error=AttributeError, message="decoder layers"
    ),
}


def supported(method: Method) -> bool:
    """Whether the installed PEFT knows the type and all of its settings."""
    if method.peft_type not in PeftType.__members__:
        return False
    known = {entry.name for entry in fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[method.peft_type]])}
    return callable(method.settings) or method.settings.keys() <= known


def base_model(method: Method) -> nn.Module:
    return away_from_zero(BASES[method.base].make())


def adapted(method: Method, folder: Path) -> PeftModel:
    """The method's own adapter on its base model, no tensor of either at zero."""
    settings = method.settings(folder) if callable(method.settings) else method.settings
    own, model = _config(method, method.peft_type, settings), base_model(method)
    torch.manual_seed(0)
    if method.first is None:
        model = get_peft_model(model, own)
    else:
        model = get_peft_model(model, _config(method, "LORA", method.first))
        model.add_adapter("second", own)
        model.set_adapter("second")
    return away_from_zero(model).eval()  # type: ignore[return-value]


def _config(method: Method, peft_type: str, settings: Settings) -> peft.PeftConfig:
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[peft_type]](task_type=BASES[method.base].task_type, **settings)


def away_from_zero(model: nn.Module) -> nn.Module:
    """Seeded noise on what trains: fresh adapters are often zero, and so are then the gradients of the others."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    return model


def batch_for(method: Method) -> Batch:
    return BASES[method.base].batch() | method.inputs


def scored(model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], str]:
    """The scores, and how those of the adapter are found once that is settled, by the log."""
    with _log() as messages:
        scores = calculate_fisher_information(model, [batch] * 3, progress=False)
    last = max(number for number, text in enumerate(messages) if "by rules of their layers" in text)
    counts = {
        way: sum(int(n) for text in messages[last:] for n in re.findall(rf"(\d+) tensors by {words}", text))
        for way, words in (("rules", "rules"), ("modules", "modules"), ("loop", "the loop"))
    }
    counts["rules"] -= sum(HEAD in name for name in scores)
    return scores, " and ".join(way for way, count in counts.items() if count > 0)


@contextmanager
def _log() -> Iterator[list[str]]:
    messages: list[str] = []
    logger, handler = logging.getLogger("fish_tuning.scores.fisher"), logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


# The document


def case_row(name: str, how: str) -> str:
    case = CASES[name]
    return _row(name, f"`{case.peft_type}`", case.base, how, "yes", "yes", case.reload, case.remark)


def refusal_row(name: str) -> str:
    refusal = REFUSALS[name]
    return _row(name, f"`{refusal.peft_type}`", refusal.base, refusal.by, refusal.remark)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def peft_version() -> str:
    """Major and minor."""
    return ".".join(peft.__version__.split(".")[:2])


def introduction() -> str:
    return f"""# PEFT methods

What can be masked, of all that PEFT {peft_version()} has. The test suite tries every row on a tiny random model.
It fails when PEFT brings a method that is not listed. `python tests/helpers/shelf.py`
writes this file.

- *scored by*: rules of layers score the adapter's tensors in batches; other modules are done again, by themselves, for
  each example of a batch; the loop does so with the whole model and is slowest. All give the same scores. The head of
  a classifier always goes by rules.
- *masked*: exactly the asked number of entries is trainable.
- *trained*: AdamW with weight decay moves these entries and leaves every other bit alone.
- *reloads*: the saved adapter has an unmasked one's keys and shapes, and stock PEFT loads it with bit-equal outputs.
"""


def document(hows: Mapping[str, str]) -> str:
    """`hows`: how each case that the installed PEFT has was scored."""
    works = [
        _row("method", "PEFT type", "tried on", "scored by", "masked", "trained", "reloads", "remarks"),
        "|---" * 8 + "|",
        *(case_row(name, how) for name, how in hows.items()),
    ]
    refused = [
        _row("method", "PEFT type", "tried on", "refused by", "why"),
        "|---" * 5 + "|",
        *map(refusal_row, REFUSALS),
    ]
    return "\n".join([introduction(), *works, "\n## Refused\n", *refused, ""])


def _score_all() -> dict[str, str]:
    hows = {}
    for name, case in ((name, case) for name, case in CASES.items() if supported(case)):
        with tempfile.TemporaryDirectory() as folder:
            hows[name] = scored(adapted(case, Path(folder)), batch_for(case))[1]
    return hows


if __name__ == "__main__":
    DOCUMENT.write_text(document(_score_all()), encoding="utf-8")
