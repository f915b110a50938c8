"""Exact sums of squared per-example gradients, by layer type, from a layer's input and its output's gradient.

A rule is `rule(module, x, g) -> {parameter name: sum over examples of the squared gradient}` with

- `x`: the layer's input, fp32 (n, P, ...) or integer ids (n, P), where P counts all positions of an example,
- `g`: the gradient at its output, fp32 (n, P, ...).

The batch dimension comes first and examples do not mix. A layer that is called more than once arrives once, its calls
put one after another along P. `register_rule` adds a layer type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Rule = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]

_RULES: dict[type[nn.Module], Rule] = {}

# Entries of per-example gradients held at a time (fp32: 64 MiB), however many examples a batch has.
CHUNK_ENTRIES = 2**24


def register_rule(*types: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Decorator: use the function for these layer types and their subclasses."""

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(types, rule))
        return rule

    return register


def rule_for(module: nn.Module) -> Rule | None:
    """The rule for a layer, by its type, or None."""
    for cls in type(module).__mro__:
        if cls in _RULES:
            return _RULES[cls]
    # transformers has one RMSNorm class a model family; they share their formula, not a base class.
    return _rms_norm if type(module).__name__.endswith("RMSNorm") else None


@register_rule(nn.Linear)
def _linear(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """y = x W^T + b: G_n = g_n^T x_n."""
    return {"weight": _outer_squares(g, x), "bias": _bias_squares(g)}


@register_rule(nn.Embedding)
def _embedding(module: nn.Module, ids: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Each example touches few rows, so its gradient is kept for those alone."""
    vocabulary, width = module.weight.shape  # type: ignore[misc]
    examples = torch.arange(ids.shape[0], device=ids.device)[:, None]
    cells, inverse = (examples * vocabulary + ids).flatten().unique(return_inverse=True)
    gradients = _scatter_add(len(cells), inverse, g.reshape(-1, width))
    if module.padding_idx is not None:
        gradients[cells % vocabulary == module.padding_idx] = 0
    return {"weight": _scatter_add(vocabulary, cells % vocabulary, gradients.square_())}


@register_rule(nn.LayerNorm)
def _layer_norm(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    dims = tuple(range(-len(module.normalized_shape), 0))  # type: ignore[arg-type]
    variance, mean = torch.var_mean(x, dim=dims, correction=0, keepdim=True)
    normalized = (x - mean) * (variance + module.eps).rsqrt()  # type: ignore[operator]
    return {"weight": (g * normalized).sum(1).square_().sum(0), "bias": _bias_squares(g)}


@register_rule(nn.RMSNorm)
def _rms_norm(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    normalized = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return {"weight": (g * normalized).sum(1).square_().sum(0)}


def _bias_squares(g: Tensor) -> Tensor:
    return g.sum(1).square_().sum(0)


def _outer_squares(g: Tensor, x: Tensor) -> Tensor:
    """sum_n (g_n^T x_n)^2 for g (n, P, o) and x (n, P, i), as (o, i)."""
    if g.shape[1] == 1:  # one position: the square of an outer product is the outer product of the squares
        return g[:, 0].square().T @ x[:, 0].square()
    total = g.new_zeros(g.shape[2], x.shape[2])
    for g_part, x_part in _chunks(g, x, entries=total.numel()):
        total += torch.bmm(g_part.transpose(1, 2), x_part).square_().sum(0)
    return total


def _chunks(*tensors: Tensor, entries: int) -> Iterator[tuple[Tensor, ...]]:
    size = max(1, CHUNK_ENTRIES // entries)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _scatter_add(size: int, index: Tensor, values: Tensor) -> Tensor:
    """Rows of `values` added up by `index`, in the same order every time on either kind of device."""
    total = values.new_zeros(size, values.shape[1])
    if values.device.type == "cpu":
        return total.index_add_(0, index, values)
    return total.index_put_((index,), values, accumulate=True)
