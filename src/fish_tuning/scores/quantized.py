"""bitsandbytes' 4-bit layers on the CPU, whose fastest kernel has no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fish_tuning.errors import FisherError
from fish_tuning.model_walks import every_module

_PACKS = "support_avx512bf16_for_cpu"  # bitsandbytes' own attribute of such a layer


def keep_unpacked(model: nn.Module) -> list[nn.Module]:
    """Have 4-bit layers on the CPU keep the kernel that has a gradient, at the price of slower evaluations there.

    A layer packs its weight in evaluation mode, where the processor has bfloat16 instructions, at the first pass whose
    inputs need no gradient. It stays packed: no gradient passes through it from then on, in training mode neither and
    without a word, and the scales of its blocks are rounded. So call this before the first pass; what is packed cannot
    be unpacked without loss. Returns the layers that would have packed.
    """
    layers = [module for module in every_module(model) if vars(module).get(_PACKS)]
    for module in layers:
        setattr(module, _PACKS, False)
    return layers


def allow_packing(layers: list[nn.Module]) -> None:
    """Undo `keep_unpacked`, which gave these layers."""
    for module in layers:
        setattr(module, _PACKS, True)


def check_unpacked(model: nn.Module) -> None:
    """FisherError where a layer is packed already."""
    if not any(map(_is_packed, every_module(model))):
        return
    for name, module in model.named_modules():
        if _is_packed(module):
            raise FisherError(
                f"The 4-bit weight of {name!r} is packed: on the CPU, bitsandbytes packs weights at the first pass in "
                "evaluation mode, and no gradient passes through them from then on. Load the model again, and score "
                "it before it is evaluated."
            )


def _is_packed(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return False
    weight: Any = module._parameters.get("weight")
    if type(weight) is nn.Parameter or weight is None:
        return False
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))
