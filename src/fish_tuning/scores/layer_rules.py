"""Exact sums of squared per-example gradients, by layer type, from what a layer saw and its output's gradient.

A rule is `rule(module, x, g) -> {parameter name: sum over examples of the squared gradient}`, dense or sparse by rows,
with

- `x`: the layer's input (or what else the rule keeps of a call), fp32 (n, P, ...) or integer ids (n, P), where P counts
  all positions of an example,
- `g`: the gradient at its output, fp32 (n, P, ...).

The batch dimension comes first and examples do not mix. A layer that is called more than once arrives once, its calls
put one after another along P. `register_rule` adds a layer type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Rule = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]

# Entries of per-example gradients held at a time (fp32: 16 MiB), however many examples a batch has.
CHUNK_ENTRIES = 2**22


def _input(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    return x


def _by_position(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(n, any number of positions, features) as (n, P, features)."""
    return x.flatten(1, -2) if x.dim() > 2 else x[:, None], g.flatten(1, -2) if g.dim() > 2 else g[:, None]


def _own_parameters(module: nn.Module) -> list[str]:
    return [name for name, parameter in module._parameters.items() if parameter is not None]


@dataclass(frozen=True)
class LayerRule:
    """A rule and what it needs to know of a layer; see `register_rule`."""

    squares: Rule
    keep: Callable[[nn.Module, Tensor, Tensor], Tensor]
    positions: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    parameters: Callable[[nn.Module], list[str]]


# By class, or by "module.Class" for classes of libraries that are not imported for this.
_RULES: dict[type[nn.Module] | str, LayerRule] = {}


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
        ...     return {"weight": (x * g).sum(1).square().sum(0)}
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
    return _RULES[nn.RMSNorm] if type(module).__name__.endswith("RMSNorm") else None


@register_rule(nn.Linear)
def _linear(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """y = x W^T + b: G_n = g_n^T x_n."""
    return {"weight": outer_squares(g, x), "bias": bias_squares(g)}


@register_rule("transformers.pytorch_utils.Conv1D")
def _transposed_linear(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """y = x W + b, GPT-2's way of storing a linear layer."""
    return {"weight": outer_squares(x, g), "bias": bias_squares(g)}


def _ids(module: nn.Module, ids: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return ids.flatten(1) if ids.dim() > 1 else ids[:, None], g.flatten(1, -2) if g.dim() > 2 else g[:, None]


@register_rule(nn.Embedding, positions=_ids)
def _embedding(module: nn.Module, ids: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Each example touches few rows, so its gradient is kept for those alone, and so are the squares (sparse)."""
    vocabulary, width = module.weight.shape  # type: ignore[misc]
    examples = torch.arange(ids.shape[0], device=ids.device)[:, None]
    cells, inverse = (examples * vocabulary + ids).flatten().unique(return_inverse=True)
    gradients = _scatter_add(len(cells), inverse, g.reshape(-1, width))
    if module.padding_idx is not None:
        gradients[cells % vocabulary == module.padding_idx] = 0
    rows, inverse = (cells % vocabulary).unique(return_inverse=True)
    squares = _scatter_add(len(rows), inverse, gradients.square_())
    shape = (vocabulary, width)
    sparse = torch.sparse_coo_tensor(rows[None], squares, shape, is_coalesced=True, check_invariants=False)
    return {"weight": sparse}


def _by_normalized_shape(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    event = module.normalized_shape
    return x.reshape(x.shape[0], -1, *event), g.reshape(g.shape[0], -1, *event)  # type: ignore[misc]


@register_rule(nn.LayerNorm, positions=_by_normalized_shape)
def _layer_norm(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    dims = tuple(range(-len(module.normalized_shape), 0))  # type: ignore[arg-type]
    variance, mean = torch.var_mean(x, dim=dims, correction=0, keepdim=True)
    normalized = (x - mean) * (variance + module.eps).rsqrt()  # type: ignore[operator]
    return {"weight": (g * normalized).sum(1).square_().sum(0), "bias": bias_squares(g)}


@register_rule(nn.RMSNorm)
def _rms_norm(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    normalized = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return {"weight": (g * normalized).sum(1).square_().sum(0)}


def _patches(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution is a linear layer on patches: (n, L, channels * kernel) and (n, L, output channels)."""
    conv: nn.Conv2d = module  # type: ignore[assignment]
    patches = nn.functional.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # type: ignore[arg-type]
    return patches.transpose(1, 2), g.flatten(2).transpose(1, 2)


def _parameters_if_zero_padded(module: nn.Module) -> list[str]:
    plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return _own_parameters(module) if plain else []


@register_rule(nn.Conv2d, positions=_patches, parameters=_parameters_if_zero_padded)
def _conv2d(module: nn.Module, patches: Tensor, g: Tensor) -> dict[str, Tensor]:
    groups: int = module.groups  # type: ignore[assignment]
    weight = torch.cat(
        [outer_squares(*pair) for pair in zip(g.chunk(groups, 2), patches.chunk(groups, 2), strict=True)]
    )
    return {"weight": weight.view(module.weight.shape), "bias": bias_squares(g)}  # type: ignore[arg-type]


def bias_squares(g: Tensor) -> Tensor:
    """sum_n (sum_p g_np)^2: squares for a tensor that is added at every position, in its shape."""
    return g.sum(1).square_().sum(0)


def outer_squares(g: Tensor, x: Tensor) -> Tensor:
    """sum_n (g_n^T x_n)^2 for g (n, P, o) and x (n, P, i), as (o, i), in parts of bounded size."""
    if g.shape[1] == 1:  # one position: the square of an outer product is the outer product of the squares
        return g[:, 0].square().T @ x[:, 0].square()
    total = g.new_zeros(g.shape[2], x.shape[2])
    height = max(1, CHUNK_ENTRIES // x.shape[2])
    for rows, g_rows in zip(total.split(height), g.split(height, dim=2), strict=True):
        for g_part, x_part in _chunks(g_rows, x, entries=rows.numel()):
            rows += torch.bmm(g_part.transpose(1, 2), x_part).square_().sum(0)
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
