"""The node of autograd between a whole tensor and the selected entries of it that train."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

# Autograd runs what was made last first. This is to run as soon as it can, and let dense gradients go.
_AT_ONCE = 2**62
# The number of the backward pass that runs in this thread, or -1: private, so that a torch may come without it.
backward_pass: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)
_IS_SPARSE: Any = Tensor.is_sparse.__get__  # type: ignore[attr-defined]


class Run(NamedTuple):
    """Tensors that are joined along their first dimension: a view of each costs as much as joining it."""

    places: list[int]  # among all tensors
    start: int  # of their entries in the memory that has those of all, run by run
    shape: tuple[int, ...]  # of the tensors joined


def runs_of(shapes: Sequence[torch.Size]) -> list[Run]:
    """Tensors of these shapes, those together that differ in their first dimension alone."""
    found: dict[torch.Size, list[int]] = {}
    for place, shape in enumerate(shapes):
        found.setdefault(shape[1:], []).append(place)
    runs, start = [], 0
    for inner, places in found.items():
        runs.append(Run(places, start, (sum(shapes[place][0] for place in places), *inner)))
        start += sum(shapes[place].numel() for place in places)
    return runs


def starts_of(shapes: Sequence[torch.Size]) -> list[int]:
    """Where each tensor begins in a memory that has them one after another, run by run."""
    starts = [0] * len(shapes)
    for run in runs_of(shapes):
        start = run.start
        for place in run.places:
            starts[place] = start
            start += shapes[place].numel()
    return starts


def whole_tensors(indices: list[Tensor] | Tensor, frozen: list[Tensor], values: list[Any]) -> tuple[Tensor, ...]:
    """The `frozen` tensors, whose gradients at the entries `indices` go to the `values`.

    `indices` is a list of each tensor's entries; or the entries of all, in the memory of which `starts_of` tells, where
    they hand on in one go.
    """
    with torch.inference_mode(False), torch.enable_grad():
        made: tuple[Any, ...] = _Selected.apply(indices, frozen, *values)  # type: ignore[no-untyped-call]
    made[0].grad_fn._set_sequence_nr(_AT_ONCE)
    return made


def whole_tensor(index: Tensor, frozen: Tensor, values: Any, passes: set[int] | None = None) -> Tensor:
    """One of them alone, for one forward pass: without gradients where the pass asks for none.

    The number of each backward pass that reaches it is added to `passes`.
    """
    made: Any = _Selected.apply([index], [frozen], values)[0]  # type: ignore[no-untyped-call]
    if made.grad_fn is not None:
        made.grad_fn._set_sequence_nr(_AT_ONCE)
        made.grad_fn.passes = passes
    return made  # type: ignore[no-any-return]


class _Selected(torch.autograd.Function):
    """Whole tensors, of which only the selected entries have a gradient, that of `values`.

    It saves nothing of a forward pass, so one node serves every pass: what it computes depends on positions alone.
    """

    @staticmethod
    def forward(ctx: Any, indices: list[Tensor] | Tensor, frozen: list[Tensor], *values: Tensor) -> tuple[Tensor, ...]:
        ctx.indices, ctx.shapes = indices, [tensor.shape for tensor in values]
        ctx.sizes, ctx.passes = [len(tensor) for tensor in values], None
        if isinstance(indices, Tensor):
            ctx.whole_shapes = [tensor.shape for tensor in frozen]
            ctx.runs, ctx.entries = runs_of(ctx.whole_shapes), sum(shape.numel() for shape in ctx.whole_shapes)
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in frozen)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        indices: Any = ctx.indices
        if ctx.passes is not None:
            ctx.passes.add(backward_pass())
        if isinstance(indices, Tensor):
            # With is_grads_batched=True all are of another kind.
            plain = set(map(type, grads)) == {Tensor} and not any(map(_IS_SPARSE, grads))
            if plain and not is_legacy_batchedtensor(grads[0]):  # type: ignore[arg-type]
                entries = _joined(grads, ctx.runs, ctx.entries).index_select(0, indices)
                # Unsafe only for who changes one and derives another: autograd need not know that they share memory.
                entries = entries.view(-1, *ctx.shapes[0][1:])
                return (None, None, *torch.unsafe_split_with_sizes(entries, ctx.sizes))
            starts = starts_of(ctx.whole_shapes)
            indices = [index - start for index, start in zip(indices.split(ctx.sizes), starts, strict=True)]
        return (None, None, *map(_gathered, grads, indices, ctx.shapes))


def _joined(grads: Sequence[Any], runs: list[Run], entries: int) -> Tensor:
    """Their entries, one tensor after another, run by run.

    Their shapes are those of the whole tensors, as autograd sees to; to ask hundreds of them costs as much as the rest.
    """
    if torch.is_grad_enabled():  # create_graph=True
        return torch.cat([grads[place].reshape(-1) for run in runs for place in run.places])
    memory: Tensor = grads[0].new_empty(entries)
    for run in runs:
        joined = memory[run.start : run.start + math.prod(run.shape)].view(run.shape)
        torch.cat([grads[place] for place in run.places], out=joined)
    return memory


def _gathered(grad: Tensor | None, index: Tensor, shape: torch.Size) -> Tensor | None:
    if grad is None:
        return None
    if grad.is_sparse:  # as nn.Embedding(sparse=True) gives it
        grad = grad.to_dense()
    # take() reads any layout in place, where reshape(-1) would copy the whole gradient; index_select is faster.
    flat = grad.view(-1).index_select(0, index) if grad.is_contiguous() else grad.take(index.long())
    return flat.view(shape)
