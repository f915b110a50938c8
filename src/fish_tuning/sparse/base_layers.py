"""What tells an adapter's base model from others: the layers that it adapts, and some entries of their weights.

The name of a base model proves nothing: folders are renamed and overwritten. A digest of all weights would read them
all, and heads and poolers that a checkpoint lacks differ from load to load.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fish_tuning.errors import MaskError

Layer = tuple[str, tuple[int, ...], tuple[int | None, ...]]

_LOOKED_AT = 64  # entries of a layer's weight, evenly spaced
# A base may be loaded in fewer bits than it was trained on in: of each weight the checksums are kept of its entries in
# these dtypes, and those compared that both bases have. Rounded twice, a number may not be what it is rounded once.
_ROUNDED = (torch.bfloat16, torch.float16)
# Starts that change the base weights when the adapter is made, so that those before and after it differ.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "orthogonal", "loftq", "lora_ga")


def base_layers(model: Any, adapter_name: str) -> tuple[Layer, ...]:
    """(name in the base model, shape of the weight, checksums of some of its entries) of each adapted layer.

    Of the embeddings where an adapter adapts no layer, as prompts do. There are no checksums of quantised weights, nor
    where the adapter's start changes the weights.
    """
    base = model.get_base_model()
    adapted = {
        name: module.get_base_layer()
        for name, module in base.named_modules()
        if isinstance(module, BaseTunerLayer) and _has(module, adapter_name) and "token_adapter" not in name.split(".")
    }
    if getattr(model.peft_config[adapter_name], "layer_replication", None):
        adapted = {}  # its layers are not the base's
    if not adapted and hasattr(base, "get_input_embeddings"):
        embeddings = base.get_input_embeddings()
        adapted = {name: module for name, module in base.named_modules() if module is embeddings}
    init = getattr(model.peft_config[adapter_name], "init_lora_weights", None)
    changed = isinstance(init, str) and init.startswith(_CHANGES_THE_BASE)
    layers = []
    for name, module in adapted.items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            layers.append((name, tuple(weight.shape), (None, None) if changed else _checksums(weight)))
    return tuple(layers)


def check_base_layers(base: nn.Module, layers: tuple[Layer, ...], told: object) -> None:
    """Raise MaskError unless the base model has these layers with these entries; `told` is the name of theirs."""
    modules = dict(base.named_modules())
    for name, shape, checksums in layers:
        module: Any = modules.get(name)
        if hasattr(module, "get_base_layer"):
            module = module.get_base_layer()
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            fault = f"it has no layer {name!r}"
        elif not _is_plain(weight):
            continue  # packed in few bits: neither its shape nor its entries are the layer's
        elif any(checksums) and tuple(weight.shape) != shape:
            fault = f"{name!r} has a weight of the shape {tuple(weight.shape)}, not {shape}"
        elif any(one != other for one, other in zip(checksums, _checksums(weight), strict=True) if one and other):
            fault = f"the weight of {name!r} has other entries"
        else:
            continue
        named = f", {told!r}" if told else ""
        raise MaskError(
            f"The sparse adapter was trained on another base model{named}: {fault}. Load that base, or pass "
            "check_base=False to add the adapter all the same."
        )


def _has(module: Any, adapter_name: str) -> bool:
    """Whether a tuner's layer has parameters of this adapter."""
    names = {name for attribute in module.adapter_layer_names for name in getattr(module, attribute, None) or ()}
    return adapter_name in names


def _is_plain(weight: Tensor) -> bool:
    return weight.is_floating_point() and not hasattr(weight, "quant_state") and not weight.is_meta


def _checksums(weight: Tensor) -> tuple[int | None, ...]:
    """None where they would be of numbers that are rounded already."""
    if not _is_plain(weight) or not weight.numel():
        return (None,) * len(_ROUNDED)
    places = torch.linspace(0, weight.numel() - 1, min(_LOOKED_AT, weight.numel()), dtype=torch.float64).long()
    some = weight.detach().take(places.to(weight.device)).cpu()
    return tuple(
        None if some.element_size() == 2 and some.dtype != dtype else _checksum(some.to(dtype)) for dtype in _ROUNDED
    )


def _checksum(entries: Tensor) -> int:
    return zlib.crc32(entries.view(torch.uint8).numpy().data) or 1  # 0 would pass for none
