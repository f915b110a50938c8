"""Building blocks of the adapters: small linear maps and the non-linearities between them."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

NON_LINEARITIES: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def small_linear(in_features: int, out_features: int, std: float, *, bias: bool = True) -> nn.Linear:
    """A linear map with weights from a normal distribution cut at two `std`, as in Houlsby et al., and zero biases."""
    linear = nn.Linear(in_features, out_features, bias=bias)
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def gate(in_features: int, bias: float) -> nn.Linear:
    """The linear map whose sigmoid is a gate; its weights start at zero, so that the gate starts at sigmoid(bias)."""
    linear = nn.Linear(in_features, 1)
    nn.init.zeros_(linear.weight)
    nn.init.constant_(linear.bias, bias)
    return linear


def features(layer: nn.Module) -> tuple[int, int]:
    """In and out features of a linear layer, however it stores its weight."""
    if isinstance(layer, Conv1D):
        weight: torch.Tensor = layer.weight
        return weight.shape[0], weight.shape[1]
    return layer.in_features, layer.out_features  # type: ignore[return-value]
