"""Rules for PEFT's layers whose trainable tensor is not that of an ordinary layer. See `per_example`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.scores.example_gradients import Each
from fish_tuning.scores.layer_rules import Gradients, register_rule


def _output(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    return output


def _magnitudes(module: Any) -> list[str]:
    """The one DoRA magnitude in use; with several active adapters the output no longer shows one's part."""
    active = [name for name in module.active_adapters if name in module.lora_magnitude_vector]
    return [f"lora_magnitude_vector.{active[0]}.weight"] if len(module.active_adapters) == len(active) == 1 else []


@register_rule(
    "peft.tuners.lora.layer.Linear",
    "peft.tuners.lora.bnb.Linear4bit",
    "peft.tuners.lora.bnb.Linear8bitLt",
    keep=_output,
    parameters=_magnitudes,
)
def _dora(module: Any, output: Tensor, g: Tensor) -> Gradients:
    """y = m * (W x + s B A x) / norm + b, with a norm that carries no gradient: dy/dm = (y - b) / m."""
    (name,) = _magnitudes(module)
    bias = getattr(module.get_base_layer(), "bias", None)
    scaled = output if bias is None else output - bias
    return {name: Each((g * scaled).sum(1).div_(module.get_parameter(name)))}


def _scales(module: Any) -> list[str]:
    active = [name for name in module.active_adapters if name in module.ia3_l]
    return [f"ia3_l.{active[0]}"] if len(module.active_adapters) == len(active) == 1 else []


def _scaled_side(module: Any, x: Tensor, output: Tensor) -> Tensor:
    return x if module.is_feedforward else output


@register_rule(
    "peft.tuners.ia3.layer.Linear",
    "peft.tuners.ia3.bnb.Linear4bit",
    "peft.tuners.ia3.bnb.Linear8bitLt",
    keep=_scaled_side,
    parameters=_scales,
)
def _ia3(module: Any, kept: Tensor, g: Tensor) -> Gradients:
    """y = (W x + b) * l: dy/dl = y / l. In feed-forward layers y = W (x * l) + b: the gradient is that of W's input."""
    (name,) = _scales(module)
    scale = module.get_parameter(name)
    if not module.is_feedforward:
        return {name: Each((g * kept / scale.flatten()).sum(1).view(-1, *scale.shape))}
    return {name: Each((kept * _input_gradient(module.base_layer, kept, g)).sum(1).view(-1, *scale.shape))}


def _input_gradient(layer: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """g W, by the layer itself: it knows how its weight is stored (transposed, in 4 or 8 bits)."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    with torch.enable_grad():
        x = x.detach().to(weight.dtype if weight.is_floating_point() else x.dtype).requires_grad_()
        output = layer(x)
    return torch.autograd.grad(output, x, g.to(output.dtype))[0].float()
