"""The exact gradients of a batch's examples, by layer type, from what a layer saw and its output's gradient.

A rule is `rule(module, x, g) -> {parameter name: the examples' gradients}`, with

- `x`: the layer's input (or what else the rule keeps of a call), fp32 (n, P, ...) or integer ids (n, P), where P counts
  all positions of an example,
- `g`: the gradient at its output, fp32 (n, P, ...).

Gradients are a tensor (n, *shape of the parameter), or what gives their sums without holding them all
(`example_gradients.py`). The batch dimension comes first and examples do not mix. A layer that is called more than once
arrives once, its calls put one after another along P. `register_rule` adds a layer type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.scores.example_gradients import Each, ExampleGradients, OfRows, OuterProducts, Stacked

Rule = Callable[[nn.Module, Tensor, Tensor], Mapping[str, ExampleGradients | Tensor]]
Gradients = dict[str, ExampleGradients]


def _input(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    return x


def _by_position(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(n, any number of positions, features) as (n, P, features)."""
    return _with_positions(x), _with_positions(g)


def _with_positions(tensor: Tensor) -> Tensor:
    if tensor.dim() == 3:
        return tensor
    return tensor.flatten(1, -2) if tensor.dim() > 2 else tensor[:, None]


def _own_parameters(module: nn.Module) -> list[str]:
    return [name for name, parameter in module._parameters.items() if parameter is not None]


@dataclass(frozen=True)
class LayerRule:
    """A rule and what it needs to know of a layer; see `register_rule`."""

    gradients: Rule
    keep: Callable[[nn.Module, Tensor, Tensor], Tensor]
    positions: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    parameters: Callable[[nn.Module], list[str]]


# By class, or by "module.Class" for classes of libraries that are not imported for this.
_RULES: dict[type[nn.Module] | str, LayerRule] = {}
_RMS_NORM = re.compile(r"(RMSNorm|(T5|Pop2Piano|Pix2Struct|SwitchTransformers|Udop)LayerNorm)$")


def register_rule(
    *types: type[nn.Module] | str,
    keep: Callable[[nn.Module, Tensor, Tensor], Tensor] = _input,
    positions: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]] = _by_position,
    parameters: Callable[[nn.Module], list[str]] = _own_parameters,
) -> Callable[[Rule], Rule]:
    """Decorator: use the function for these layer types and their subclasses.

    Args:
        types: classes, or their full names ("package.module.Class") where importing them would cost too much.
        keep: `keep(module, input, output)` is the tensor that is saved of a call and comes to the rule as `x`; the
            input if not given.
        positions: `positions(module, x, g)` brings a call's fp32 tensors, or ids, from the layer's own shapes to
            (n, P, ...); by default everything between the first and the last dimension counts as positions.
        parameters: names of the tensors that the rule covers, relative to the module; by default all of its own.

    Example:
        >>> import torch
        >>> from fish_tuning import register_rule
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(3))
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> @register_rule(Scale)
        ... def scale(module, x, g):
        ...     return {"weight": (x * g).sum(1)}  # (n, 3)
    """

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(types, LayerRule(rule, keep, positions, parameters)))
        return rule

    return register


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule for a layer, by its type, or None."""
    for cls in type(module).__mro__:
        rule = _RULES.get(cls) or _RULES.get(f"{cls.__module__}.{cls.__qualname__}")
        if rule is not None:
            return rule
    # transformers has one RMSNorm class a model family; they share their formula, not a base class.
    return _RULES[nn.RMSNorm] if _RMS_NORM.search(type(module).__name__) else None


@register_rule(nn.Linear)
def _linear(module: nn.Module, x: Tensor, g: Tensor) -> Gradients:
    """y = x W^T + b: G_n = g_n^T x_n."""
    return {"weight": OuterProducts(g, x)} | _bias(module, g)


def _bias(module: nn.Module, g: Tensor) -> Gradients:
    """Of what is added to each position. LoRA's layers have none, and sums for nothing take time."""
    return {} if module.bias is None else {"bias": Each(g.sum(1))}


@register_rule("transformers.pytorch_utils.Conv1D")
def _transposed_linear(module: nn.Module, x: Tensor, g: Tensor) -> Gradients:
    """y = x W + b, GPT-2's way of storing a linear layer."""
    return {"weight": OuterProducts(x, g)} | _bias(module, g)


def _ids(module: nn.Module, ids: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return ids.flatten(1) if ids.dim() > 1 else ids[:, None], g.flatten(1, -2) if g.dim() > 2 else g[:, None]


def looks_up(module: nn.Module) -> bool:
    """Whether the module reads the rows of its table that it is given, and scales them at most.

    BART's and Gemma's word embeddings scale. Tables of positions that a module counts itself would be told from that by
    an example's proof, but where its ids happen to be those positions; gradients that are divided by how often a row is
    read, but where no id comes twice.
    """
    plain = type(module).forward is nn.Embedding.forward
    by_frequency = bool(getattr(module, "scale_grad_by_freq", False))
    return isinstance(module, nn.Embedding) and not by_frequency and (plain or hasattr(module, "embed_scale"))


def scaled(module: nn.Module, g: Tensor) -> Tensor:
    """The gradient at an embedding's output as that at the rows that it read."""
    plain = type(module).forward is nn.Embedding.forward
    scale: Any = None if plain else getattr(module, "embed_scale", None)
    if isinstance(scale, Tensor):
        scale = scale.to(module.get_parameter("weight").dtype).to(g)  # rounded as the model rounds it
    return g if scale is None else g * scale


@register_rule(nn.Embedding, positions=_ids, parameters=lambda module: ["weight"] if looks_up(module) else [])
def _embedding(module: nn.Module, ids: Tensor, g: Tensor) -> Gradients:
    return {"weight": OfRows(ids, scaled(module, g), module.num_embeddings, module.padding_idx)}  # type: ignore[arg-type]


def _by_normalized_shape(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    event = module.normalized_shape
    return x.reshape(x.shape[0], -1, *event), g.reshape(g.shape[0], -1, *event)  # type: ignore[misc]


@register_rule(nn.LayerNorm, positions=_by_normalized_shape)
def _layer_norm(module: nn.Module, x: Tensor, g: Tensor) -> Gradients:
    normalized = nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)  # type: ignore[arg-type]
    return {"weight": Each((g * normalized).sum(1)), "bias": Each(g.sum(1))}


@register_rule(nn.RMSNorm)
def _rms_norm(module: nn.Module, x: Tensor, g: Tensor) -> Gradients:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    normalized = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return {"weight": Each((g * normalized).sum(1))}


def _patches(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution is a linear layer on patches: (n, L, channels * kernel) and (n, L, output channels)."""
    conv: nn.Conv2d = module  # type: ignore[assignment]
    patches = nn.functional.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # type: ignore[arg-type]
    return patches.transpose(1, 2), g.flatten(2).transpose(1, 2)


def _parameters_if_zero_padded(module: nn.Module) -> list[str]:
    plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return _own_parameters(module) if plain else []


@register_rule(nn.Conv2d, positions=_patches, parameters=_parameters_if_zero_padded)
def _conv2d(module: nn.Module, patches: Tensor, g: Tensor) -> Gradients:
    groups: int = module.groups  # type: ignore[assignment]
    pairs = zip(g.chunk(groups, 2), patches.chunk(groups, 2), strict=True)
    weight = Stacked([OuterProducts(*pair) for pair in pairs], module.weight.shape)  # type: ignore[arg-type]
    return {"weight": weight} | _bias(module, g)
