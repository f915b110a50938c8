"""The node of autograd between a whole tensor and the selected entries of it that train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Autograd runs what was made last first. This is to run as soon as it can, and let dense gradients go.
_AT_ONCE = 2**62


def runs_of(shapes: Sequence[torch.Size]) -> list[list[int]]:
    """The places of tensors that are joined along their first dimension, run by run.

    A view of each tensor costs as much as joining it.
    """
    runs: dict[torch.Size, list[int]] = {}
    for place, shape in enumerate(shapes):
        runs.setdefault(shape[1:], []).append(place)
    return list(runs.values())


def starts_of(shapes: Sequence[torch.Size]) -> list[int]:
    """Where each tensor begins in a memory that has them one after another, run by run."""
    start, starts = 0, [0] * len(shapes)
    for run in runs_of(shapes):
        for place in run:
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


def whole_tensor(index: Tensor, frozen: Tensor, values: Any) -> Tensor:
    """One of them alone, for one forward pass: without gradients where the pass asks for none."""
    made: Any = _Selected.apply([index], [frozen], values)[0]  # type: ignore[no-untyped-call]
    if made.grad_fn is not None:
        made.grad_fn._set_sequence_nr(_AT_ONCE)
    return made  # type: ignore[no-any-return]


class _Selected(torch.autograd.Function):
    """Whole tensors, of which only the selected entries have a gradient, that of `values`.

    It saves nothing of a forward pass, so one node serves every pass: what it computes depends on positions alone.
    """

    @staticmethod
    def forward(ctx: Any, indices: list[Tensor] | Tensor, frozen: list[Tensor], *values: Tensor) -> tuple[Tensor, ...]:
        ctx.indices, ctx.shapes = indices, [tensor.shape for tensor in values]
        ctx.sizes = [len(tensor) for tensor in values]
        if isinstance(indices, Tensor):
            ctx.whole_shapes = [tensor.shape for tensor in frozen]
            ctx.runs = runs_of(ctx.whole_shapes)
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in frozen)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        indices: Any = ctx.indices
        if isinstance(indices, Tensor):
            if all(grad is not None and not grad.is_sparse for grad in grads):
                entries = _joined(grads, ctx.runs).index_select(0, indices)
                # Unsafe only for who changes one and derives another: autograd need not know that they share memory.
                entries = entries.view(-1, *ctx.shapes[0][1:])
                return (None, None, *torch.unsafe_split_with_sizes(entries, ctx.sizes))
            starts = starts_of(ctx.whole_shapes)
            indices = [index - start for index, start in zip(indices.split(ctx.sizes), starts, strict=True)]
        return (None, None, *map(_gathered, grads, indices, ctx.shapes))


def _joined(grads: Sequence[Any], runs: list[list[int]]) -> Tensor:
    """Their entries, one tensor after another, run by run."""
    if torch.is_grad_enabled():  # create_graph=True
        return torch.cat([grads[place].reshape(-1) for run in runs for place in run])
    memory: Tensor = grads[0].new_empty(sum(grad.numel() for grad in grads))
    start = 0
    for run in runs:
        inner = grads[run[0]].shape[1:]
        end = start + sum(len(grads[place]) for place in run) * inner.numel()
        torch.cat([grads[place] for place in run], out=memory[start:end].view(-1, *inner))
        start = end
    return memory


def _gathered(grad: Tensor | None, index: Tensor, shape: torch.Size) -> Tensor | None:
    if grad is None:
        return None
    if grad.is_sparse:  # as nn.Embedding(sparse=True) gives it
        grad = grad.to_dense()
    # take() reads any layout in place, where reshape(-1) would copy the whole gradient; index_select is faster.
    flat = grad.view(-1).index_select(0, index) if grad.is_contiguous() else grad.take(index.long())
    return flat.view(shape)
