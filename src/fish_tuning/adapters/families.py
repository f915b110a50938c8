"""Where the layers of a model family keep what the adapters attach to, found by the names of its modules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from fish_tuning.adapters.errors import AdapterError
from fish_tuning.errors import did_you_mean

# Ends of module names, or one regular expression for the whole name: PEFT's `target_modules`.
Names = list[str] | str


@dataclass(frozen=True)
class Family:
    """Names of the projections of one layer.

    `query` is the projection that reads the attention's input, once an attention layer: the query's, or the fused one.
    """

    query: str
    lora: tuple[str, ...]
    attention_output: str
    feedforward_output: str

    @property
    def feedforward_only(self) -> str:
        """A regular expression: in BERT, `output.dense` is also the end of `attention.output.dense`."""
        return rf".*(?<!attention)\.{re.escape(self.feedforward_output)}"


FAMILIES = (
    # BERT, RoBERTa, ELECTRA
    Family(
        "attention.self.query",
        ("attention.self.query", "attention.self.value"),
        "attention.output.dense",
        "output.dense",
    ),
    # ViT, DeiT and BEiT in the first releases of transformers 5
    Family(
        "attention.attention.query",
        ("attention.attention.query", "attention.attention.value"),
        "attention.output.dense",
        "output.dense",
    ),
    # ModernBERT
    Family("attn.Wqkv", ("attn.Wqkv",), "attn.Wo", "mlp.Wo"),
    # Llama, Qwen2, Qwen3, Mistral, Gemma
    Family("self_attn.q_proj", ("self_attn.q_proj", "self_attn.v_proj"), "self_attn.o_proj", "mlp.down_proj"),
    # Phi-3
    Family("self_attn.qkv_proj", ("self_attn.qkv_proj",), "self_attn.o_proj", "mlp.down_proj"),
    # ViT, DeiT, BEiT, DINOv2
    Family("attention.q_proj", ("attention.q_proj", "attention.v_proj"), "attention.o_proj", "mlp.fc2"),
    # DistilBERT
    Family("attention.q_lin", ("attention.q_lin", "attention.v_lin"), "attention.out_lin", "ffn.lin2"),
    # GPT-2
    Family("attn.c_attn", ("attn.c_attn",), "attn.c_proj", "mlp.c_proj"),
)


def find_family(model: nn.Module, field: str, *, with_query: bool = False) -> Family:
    """The first family whose output projections (and query projection) `model` has, as many of each.

    Raises:
        AdapterError: no family fits; the message names the model's linear layers and the `field` to set.
    """
    for family in FAMILIES:
        kinds: list[Names] = [[family.attention_output], family.feedforward_only]
        numbers = {len(matching(model, kind)) for kind in kinds + ([[family.query]] if with_query else [])}
        if len(numbers) == 1 and numbers != {0}:
            return family
    raise AdapterError(
        f"{type(model).__name__} has no layers whose attention and feed-forward projections are known by name; its "
        f"linear layers are {', '.join(linear_names(model))}. Set {field} to those that should be adapted."
    )


def matches(name: str, names: Names) -> bool:
    """Whether a module's name is meant by `names`."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in names)


def matching(model: nn.Module, names: Names) -> list[str]:
    """The names of the modules that `names` means."""
    return [name for name, _ in base_modules(model) if matches(name, names)]


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules by the names that they have without adapters; a wrapped one stands for its wrapper."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside += (f"{name}.",)
        yield name, module


def check_names(model: nn.Module, field: str, names: Names) -> None:
    """Raise AdapterError for an entry that means no module, or one that is not linear."""
    for entry in [names] if isinstance(names, str) else names:
        wanted: Names = entry if isinstance(names, str) else [entry]
        found = [(name, module) for name, module in base_modules(model) if matches(name, wanted)]
        linear = linear_names(model)
        if not found:
            raise AdapterError(
                f"{field}: {type(model).__name__} has no module {entry!r}; its linear layers are {', '.join(linear)}."
                f"{did_you_mean(entry, linear)}"
            )
        other = next(((name, module) for name, module in found if not is_linear(module)), None)
        if other is not None:
            raise AdapterError(
                f"{field}: {entry!r} means {other[0]}, which is a {type(other[1]).__name__}; only linear layers can be "
                f"adapted: {', '.join(linear)}."
            )


def check_layers(model: nn.Module, names: list[str], layers: list[int]) -> None:
    """Raise AdapterError for a number in `layers` that none of the modules `names` lies in."""
    present = sorted({number for name in names if (number := layer_number(name)) is not None})
    missing = [layer for layer in layers if layer not in present]
    if missing:
        has = f"layers {present[0]} to {present[-1]}" if present else "no numbered layers"
        raise AdapterError(f"layers_to_transform={layers}: {type(model).__name__} has {has}, not {missing}.")


def is_targeted(name: str, names: Names, config: object) -> object:
    """Whether `config` adapts a module that `names` means; PEFT's answer, with the layers picked by our own rule.

    PEFT's own rule finds no layer number in `layers.0.mlp`, as in a model without a head, and ignores
    `layers_to_transform` beside a regular expression.
    """
    chosen = SimpleNamespace(
        target_modules=names,
        target_parameters=None,
        exclude_modules=getattr(config, "exclude_modules", None),
        modules_to_save=getattr(config, "modules_to_save", None),
    )
    found = check_target_module_exists(chosen, name)
    layers = getattr(config, "layers_to_transform", None)
    return found if not found or layers is None else layer_number(name) in layers


def layer_number(name: str) -> int | None:
    """2 for `encoder.layer.2.output.dense`."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def linear_names(model: nn.Module) -> list[str]:
    """The names of the linear layers, each kind once: without what stands before the layer number."""
    return sorted({re.sub(r"^.*?\.\d+\.", "", name) for name, module in base_modules(model) if is_linear(module)})


def is_linear(module: nn.Module) -> bool:
    """Whether a module, or what an adapter wraps, is a linear layer, a quantized one included."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return isinstance(module, nn.Linear | Conv1D) or (
        hasattr(module, "in_features") and hasattr(module, "out_features")
    )
