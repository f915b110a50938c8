"""Layers without a rule: what they do is done again, one example at a time, for their own tensors' gradients.

That takes the layer's own time and no more, where the loop takes the whole model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from fish_tuning.errors import out_of_memory
from fish_tuning.scores.watched_layers import Pass, WatchedLayer


@dataclass(frozen=True)
class _Call:
    """How the module was called, without the tensors, and which of its outputs this is."""

    arguments: list[Any]
    tree: TreeSpec
    output: int
    number: int  # of the call, among those of a pass
    autocast: tuple[bool, torch.dtype]

    def again(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        left = iter(tensors)
        arguments = [next(left) if argument is Tensor else argument for argument in self.arguments]
        args, kwargs = tree_unflatten(arguments, self.tree)
        return args, kwargs


class RecomputedLayer(WatchedLayer):
    """Scores its tensors from the tensors that it was called with and the gradients of its outputs.

    Tensors with as many rows as the batch has examples, or the output has, are taken for the examples' one after
    another, others as the same for all. Whether that holds, its proof shows; and what its proof took for the same for
    all is so in other batches too, though it has as many rows as these have examples (heads, windows, tokens).
    """

    def __init__(self, module: nn.Module, names: dict[str, str], state: Pass) -> None:
        super().__init__(module, names, state)
        self.proofs: dict[tuple[int, int, int], set[bool]] = {}  # by argument: whether proofs took it for examples'

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.names or self.state.anchor is None:
            return None
        arguments, tree = tree_flatten((args, kwargs))
        outputs, output_tree = tree_flatten(output)
        rows = {value.shape[0] for value in outputs if isinstance(value, Tensor) and value.dim()}
        rows = {self.state.batch_size, *rows} - {1}
        if any(_may_be_by_row(value, rows) for value in (*args, *kwargs.values())):
            self.fail("a list among its arguments may have an entry for each example")
            return None
        probed = False
        tensors = tuple(argument for argument in arguments if isinstance(argument, Tensor))
        self.look_at_order(*tensors)
        arguments = [Tensor if isinstance(argument, Tensor) else argument for argument in arguments]
        for number, value in enumerate(outputs):
            if isinstance(value, Tensor) and value.requires_grad:
                device = value.device.type
                autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
                value = self.a_row_each(value) if self.serves_all(value) else value
                outputs[number] = self.probe(value, _Call(arguments, tree, number, self.calls, autocast), tensors)
                probed = True
        return tree_unflatten(outputs, output_tree) if probed else None

    def add_up(self) -> None:
        arrived, self.arrived = self.arrived, []
        if not arrived or self.failed:
            return
        if not all(self.examples_in_order(g.shape) for *_, g in arrived):
            return
        try:
            self._add_up(arrived)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if out_of_memory(error):
                raise
            self.fail(f"it cannot be computed again for one example ({type(error).__name__}: {error})")

    def _add_up(self, arrived: list[tuple[_Call, tuple[Tensor, ...], Tensor]]) -> None:
        into, check, size = self.state.into, self.state.check, self.state.batch_size
        if self.is_proving():
            for call, kept, g in arrived:
                for place, of_examples in self._like_examples(call, kept, g):
                    self.proofs.setdefault(place, set()).add(of_examples)
        if check is not None:
            for name, gradient in self._gradients(arrived, None).items() if check.together else ():
                if name in check.together:
                    check.made.add(check.of_sum, name, gradient.square(), lambda of=gradient: of)  # type: ignore[misc]
            if check.together:
                arrived = [(call, kept, _freed(g, check.weights)) for call, kept, g in arrived]
            for row in check.rows if check.alone else ():
                for name, gradient in self._gradients(arrived, row).items():
                    if name in check.alone:
                        made = check.made
                        made.add(check.of_row, name, gradient.square(), lambda of=gradient: of)  # type: ignore[misc]
        sums: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        for row in range(size):
            for name, gradient in self._gradients(arrived, row).items():
                for totals, part in ((sums, gradient), (squares, gradient.square())):
                    totals[name] = totals[name] + part if name in totals else part
        for name, total in squares.items():
            into.add(name, total, lambda name=name: sums[name])  # type: ignore[union-attr, misc]
            if check is not None and name in check.together:
                check.made.add(check.of_batch, name, total, lambda name=name: sums[name])  # type: ignore[misc]

    def _gradients(self, arrived: list[tuple[_Call, tuple[Tensor, ...], Tensor]], row: int | None) -> dict[str, Tensor]:
        """{name in the model: fp32 gradient} of one example, or of all together."""
        found: dict[str, Tensor] = {}
        for call, kept, g in arrived:
            tensors = tuple(tensor.detach() for tensor in kept)
            if row is not None:
                tensors = tuple(
                    self._of_example(tensor, row) if self._is_examples(place, alike) else tensor
                    for tensor, (place, alike) in zip(tensors, self._like_examples(call, kept, g), strict=True)
                )
                g = self._of_example(g, row)
            stand_ins = {local: self.module.get_parameter(local).detach().requires_grad_() for local in self.names}
            args, kwargs = call.again(tensors)
            enabled, dtype = call.autocast
            with self._unwatched(), torch.enable_grad(), torch.autocast(g.device.type, dtype, enabled=enabled):
                outputs = functional_call(self.module, stand_ins, args, kwargs, tie_weights=False)
                output = tree_flatten(outputs)[0][call.output]
                output = (
                    output.expand_as(g) if output.shape[:1].numel() == 1 else output
                )  # one row of positions for all
            gradients = torch.autograd.grad(output, list(stand_ins.values()), g.to(output.dtype), allow_unused=True)
            for name, gradient in zip(self.names.values(), gradients, strict=True):
                if gradient is not None:
                    gradient = self.state.scale.unscaled(gradient.float())
                    found[name] = found[name] + gradient if name in found else gradient
        return found

    def _like_examples(
        self, call: _Call, kept: tuple[Tensor, ...], g: Tensor
    ) -> Iterator[tuple[tuple[int, int, int], bool]]:
        """Each tensor's place among the arguments, and whether it has as many rows as there are examples."""
        of_examples = {self.state.batch_size, g.shape[0]}
        for number, tensor in enumerate(kept):
            yield (call.number, len(kept), number), tensor.shape[:1].numel() in of_examples

    def _is_examples(self, place: tuple[int, int, int], alike: bool) -> bool:
        """ValueError where that cannot be told."""
        proofs = self.proofs.get(place, set())
        if alike and True not in proofs and not proofs:
            raise ValueError("an argument came that its proof did not have")
        if alike and len(proofs) > 1:
            raise ValueError("an argument may be the examples' or the same for all")
        return alike and True in proofs

    def _of_example(self, tensor: Tensor, row: int) -> Tensor:
        each = tensor.shape[0] // self.state.batch_size
        return tensor[row * each : (row + 1) * each]

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        """What is computed again runs through the same hooks, which are to leave it alone."""
        anchor, self.state.anchor = self.state.anchor, None
        try:
            yield
        finally:
            self.state.anchor = anchor


def _may_be_by_row(value: Any, numbers: set[int]) -> bool:
    """Whether an argument that is no tensor may hold something for each example: lengths, spans, names.

    Entries that are all alike are taken for none: these are the same for each example.
    """
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and len(value) in numbers and any(_unlike(each, value[0]) for each in value)
    if isinstance(value, Mapping):
        numbered = len(value) in numbers and set(value) == set(range(len(value)))
        return numbered or any(_may_be_by_row(each, numbers) for each in value.values())
    if not isinstance(value, (list, tuple, range)) or isinstance(value, torch.Size):
        return False
    if len(value) in numbers:
        tensors = [each for each in value if isinstance(each, Tensor)]
        if len(tensors) == len(value):
            # Not the cosines and sines of positions, in a tuple, nor what layers gave of all examples.
            rows = numbers if isinstance(value, list) else numbers | {1}
            return not all(each.dim() and each.shape[0] in rows for each in tensors)
        if not any(isinstance(each, Tensor) for each in tree_leaves(list(value))):
            return any(_unlike(each, value[0]) for each in value)
    return any(_may_be_by_row(each, numbers) for each in value)


def _unlike(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return not np.array_equal(one, other)
    try:
        return bool(one != other)
    except (ValueError, TypeError):  # of what holds arrays, whose entries are compared
        return True


def _freed(g: Tensor, weights: Tensor) -> Tensor:
    """`g` without the examples' weights."""
    each = g.shape[0] // len(weights)
    return g / weights.to(g).repeat_interleave(each).view(-1, *[1] * (g.dim() - 1))
