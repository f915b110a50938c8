"""Which modules of a model to adapt, and which belong to its head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from fish_tuning.errors import ConfigurationError, did_you_mean
from fish_tuning.scores.losses import loss_type_of

# The attention input projections under the names that model families give them; the first set found is the default.
ATTENTION_PROJECTIONS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("query_key_value",),
    ("Wqkv",),
    ("qkv_proj",),
    ("c_attn",),
)


def target_modules(asked: Sequence[str] | str | None, model: Any) -> list[str] | str:
    """The asked targets (`lora.target_modules`), else the attention's input projections."""
    if asked is not None:
        return asked if isinstance(asked, str) else _present(asked, model)
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for projections in ATTENTION_PROJECTIONS:
        if present.issuperset(projections):
            return list(projections)
    model_type = getattr(model.config, "model_type", "")
    if model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        return list(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type])
    raise ConfigurationError(
        f"lora.target_modules: no usual attention projection was found in {type(model).__name__}, whose linear layers "
        f"are {', '.join(linear_names(model))}. Set lora.target_modules."
    )


def _present(asked: Sequence[str], model: nn.Module) -> list[str]:
    for target in asked:
        if not any(name == target or name.endswith(f".{target}") for name, _ in model.named_modules()):
            names = linear_names(model)
            raise ConfigurationError(
                f"lora.target_modules: {type(model).__name__} has no module {target!r}; its linear layers are "
                f"{', '.join(names)}.{did_you_mean(target, names)}"
            )
    return list(asked)


def head_names(base: Any) -> list[str]:
    """The modules beside the encoder: those that the task brings, new and trained as a whole.

    A causal language model brings none: its head is pretrained.
    """
    if is_language_model(base):
        return []
    return [
        name
        for name, child in base.named_children()
        if name != base.base_model_prefix and any(True for _ in child.parameters())
    ]


def is_language_model(base: Any) -> bool:
    return loss_type_of(base) == "ForCausalLM"


def linear_names(model: nn.Module) -> list[str]:
    return module_names(model, lambda module: isinstance(module, nn.Linear))


def module_names(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[str]:
    """The last parts of the names of the wanted modules."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if wanted(module)})
