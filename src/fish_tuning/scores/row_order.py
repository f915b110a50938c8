"""Whether data decided which rows a layer has, and in which order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from fish_tuning.model_walks import every_parameter

# Autograd's nodes of what picks rows by numbers; of these, what takes rows and does not put some among others.
_BY_DATA = re.compile(r"Index|Gather|Scatter|Take|Sort|MaskedSelect|_?PackPadded")
_TAKES = re.compile(r"Index(Select)?Backward|Gather|Take|Sort")
_FOLDS = re.compile(r"(Unsafe)?View|ReshapeAlias|Addmm|Mm")  # what a linear layer does with (n, P, d): rows, and back
_OF_A_PARAMETER = "torch::autograd::AccumulateGrad"
_OUTPUTS = "_input_metadata"  # what a node's gradients come in for
_MOST_NODES, _MOST_STEPS = 20_000, 1000
# Whether it can be read what a node saved without a call of the hooks it was given to: not in torch 2.6.
READABLE = hasattr(torch._C._autograd.SavedTensor, "unpack_hook")
_TRACKED: ContextVar[bool] = ContextVar("tracked", default=False)


@dataclass
class Known:
    """What looks at the order of a forward pass's layers share."""

    in_order: set[Any] = field(default_factory=set)  # nodes before which nothing was picked by data
    by_data: set[Any] = field(default_factory=set)  # nodes before which something was
    of_batch: dict[Any, bool] = field(default_factory=dict)  # nodes, and whether they have the batch's rows
    picked: bool = False  # whether rows were picked, though so that they are in order: the next batch's may not be

    def forget_nodes(self) -> None:
        """Which hold the graph of a pass."""
        self.in_order.clear()
        self.by_data.clear()
        self.of_batch.clear()


def ordered_by_data(x: Tensor, batch_size: int, known: Known | None = None) -> bool:
    """Whether rows of `x` were picked one by one on their way from tensors (n, P, ...) of n examples.

    As with tokens that are routed to experts. A proof does not show that: the rows of one batch may be in their places,
    and those of the next not. Autograd's graph does; of an input that needs no gradient there is none, which tells
    nothing (False; `tracked` gives it one). Picked within each example, as a text's last token, they are in order: the
    numbers that they were picked by tell that, of this batch.
    """
    if not hasattr(x.grad_fn, _OUTPUTS):  # nor has a version of torch that tells no shapes
        return False
    known = Known() if known is None else known
    left: list[tuple[Any, bool]] = [(x.grad_fn, False)]
    seen: set[Any] = set()
    of_examples = {batch_size, x.shape[0]}

    def of_batch(node: Any) -> bool:
        if node not in known.of_batch:
            known.of_batch[node] = _has_rows(node, {batch_size})
        return known.of_batch[node]

    while left and len(seen) < _MOST_NODES:
        node, unfolded = left.pop()
        if node is None or node in seen or node in known.in_order:
            continue
        seen.add(node)
        earlier = [each for each, _ in node.next_functions if each is not None and each.name() != _OF_A_PARAMETER]
        folded = not of_batch(node)
        if node in known.by_data or _picked_by_data(node, earlier, folded, of_examples, batch_size, known):
            known.by_data |= {node, x.grad_fn}
            return True
        if unfolded := unfolded or not folded:
            # Before the examples' rows there were these too, unless they were made of something else.
            earlier = [each for each in earlier if of_batch(each) or _FOLDS.match(each.name())]
        left += [(each, unfolded) for each in earlier]
    known.in_order |= {node for node in seen if known.of_batch[node]}
    return False


def _picked_by_data(
    node: Any, earlier: list[Any], folded: bool, of_examples: set[int], batch_size: int, known: Known
) -> bool:
    if earlier and (_BY_DATA if folded else _TAKES).match(node.name()) and _along_rows(node, folded):
        if not all(_has_rows(each, of_examples) for each in earlier) or not _in_order(node, earlier, batch_size):
            return True
        known.picked = True
    if of_parts := _rows_of_parts(node, batch_size):
        if not _as_many_of_each(torch.tensor(of_parts), batch_size):
            return True
        known.picked = True
    return False


@contextmanager
def tracked(model: nn.Module) -> Iterator[None]:
    """Forward passes have a graph from the batch on, as if all trained, of which no tensor but numbers is kept."""
    frozen = [
        parameter
        for parameter in every_parameter(model)
        if not parameter.requires_grad and parameter.is_floating_point() and not parameter.is_inference()
    ]
    handle = model.register_forward_pre_hook(_with_gradients, with_kwargs=True)
    token = _TRACKED.set(True)
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        with _Unbroken(), saved_tensors_hooks(_numbers_kept, _numbers_kept):
            yield
    finally:
        _TRACKED.reset(token)
        handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(False)


def is_tracked() -> bool:
    """Whether what is computed now is so that its graph tells the order of rows."""
    return _TRACKED.get()


class _Unbroken(TorchFunctionMode):
    """The graph goes on where a model ends it: behind a body under `torch.no_grad`, or whose states are detached."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            return None
        if func is Tensor.detach and torch.is_grad_enabled() and args[0].is_floating_point():
            return args[0].view_as(args[0])
        return func(*args, **(kwargs or {}))


def _with_gradients(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    return tuple(map(_with_gradient, args)), {key: _with_gradient(value) for key, value in kwargs.items()}


def _with_gradient(value: Any) -> Any:
    """A tensor of the batch, so that what is picked of it can be told; a copy, which a model may change in place."""
    floats = isinstance(value, Tensor) and value.is_floating_point() and not value.is_inference()
    return value.detach().requires_grad_().clone() if floats else value


def _numbers_kept(tensor: Tensor | None) -> Any:
    return None if tensor is None or tensor.is_floating_point() or tensor.is_complex() else tensor


def _in_order(node: Any, earlier: list[Any], batch_size: int) -> bool:
    """Whether what was picked of a tensor with several rows is as many of each, one after another."""
    (source, *_), (made, *_) = _shapes(earlier[0]), _shapes(node)
    picked = _rows_picked(node, source[0])
    if picked is None or len(picked) != made[0]:
        return False
    if len(picked) == source[0] == batch_size:  # in another order they are the same examples
        picked = picked.sort().values
    return _as_many_of_each(picked, source[0])


def _as_many_of_each(rows: Tensor, number: int) -> bool:
    each, rest = divmod(len(rows), number)
    return not rest and bool((rows == torch.arange(len(rows), device=rows.device) // each).all())


def _rows_picked(node: Any, number: int) -> Tensor | None:
    """Of a tensor's rows, those that were picked; None where the graph does not say."""
    several = _indices(node)
    numbers = [_kept(each) for each in several or [getattr(node, "_raw_saved_index", None)]]
    if numbers[0] is None or not (several or numbers[0].dim() == 1):
        return None
    rows = torch.broadcast_tensors(
        *(
            part
            for each in numbers
            if each is not None
            for part in (each.nonzero(as_tuple=True) if each.dtype in (torch.bool, torch.uint8) else [each])
        )
    )[0]
    if not rows.numel():
        return None
    rows = rows.reshape(len(rows) if rows.dim() else 1, -1) % number  # some are counted from the end
    return rows[:, 0] if bool((rows == rows[:, :1]).all()) else None


def _rows_of_parts(node: Any, batch_size: int) -> list[int]:
    """Of what was put together row by row: the example that each is of. Empty where the graph does not say."""
    stacked, joined = node.name().startswith("Stack"), node.name().startswith("Cat")
    if not (stacked or joined) or not _along_rows(node) or len(node.next_functions) < 2:
        return []
    found: list[int] = []
    for part, number in node.next_functions:
        shapes = _shapes(part)
        if len(shapes) <= number or (joined and not len(shapes[number])):
            return []
        examples = _examples_of(part, number, batch_size, 1 if stacked else shapes[number][0])
        if not examples:
            return []
        found += examples
    return found


def _examples_of(part: Any, number: int, batch_size: int, rows: int) -> list[int]:
    """Of a part of the batch's rows, or of those of all its tokens, such as `x[row]` and what was made of it."""
    whole = part
    for _ in range(_MOST_STEPS):
        if part is None or not part.next_functions or _has_rows(part, {batch_size}):
            return []
        earlier, at = part.next_functions[0]
        kind = part.name().partition("Backward")[0]
        shape: Any = _shapes(earlier)[at] if earlier is not None and len(_shapes(earlier)) > at else ()
        taken = kind in ("Select", "Slice", "Unbind") and getattr(part, "_saved_dim", None) == 0
        if taken and len(shape) > 1 and not shape[0] % batch_size:
            index = number if kind == "Unbind" else int(part._saved_index if kind == "Select" else part._saved_start)
            first, each = (index - 2**64 if index >= 2**63 else index) % shape[0], shape[0] // batch_size
            step = int(part is whole and kind == "Slice")
            return [(first + step * row) // each for row in range(rows)]
        part, number = earlier, at
    return []


def _kept(saved: Any) -> Tensor | None:
    """A tensor that autograd saved; None where it was given to hooks, as checkpointing's, which would compute it."""
    if not READABLE or saved is None or saved.unpack_hook not in (None, _numbers_kept):
        return None
    value: Tensor | None = saved.data
    return value


def _shapes(node: Any) -> list[Any]:
    """Of what the node's operation gave."""
    return [of_output.shape for of_output in getattr(node, _OUTPUTS, ())]


def _has_rows(node: Any, numbers: set[int]) -> bool:
    """So many, each of several dimensions."""
    return any(len(shape) > 2 and shape[0] in numbers for shape in _shapes(node))


def _along_rows(node: Any, unless_told: bool = True) -> bool:
    """Not where a column is picked of each row, as an expert's weight of each token's."""
    if indices := _indices(node):
        return not (indices[0].data is None and indices[0].unpack_hook is None) if READABLE else unless_told
    dimension: int = getattr(node, "_saved_dim", 0)
    shapes = _shapes(node)
    if not shapes or not len(shapes[0]):
        return True
    return (dimension - 2**64 if dimension >= 2**63 else dimension) % len(shapes[0]) == 0


def _indices(node: Any) -> tuple[Any, ...]:
    """What `x[...]` was given for x's dimensions, as autograd saved it."""
    saved = getattr(node, "_raw_saved_indices", ())
    return saved if isinstance(saved, tuple) else ()
