"""Masked values that lie in one memory are stepped as one tensor, by optimizers that work entry by entry.

What hundreds of small tensors cost an optimizer is looking at each of them, not their entries. So their gradients are
hidden while the optimizer steps; then its own step is done for one tensor over all values of a group, another over
their gradients, and others over their states. Nothing of it is kept: the values are the parameters, the optimizer has
the state of each, and only the memory of these states is moved once, so that they lie together. Where anything lies
elsewhere than expected, or one of the values was stepped less often, the optimizer steps each as ever.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fish_tuning.sparse.values import DATA, MaskedGroup

# By the class itself: a subclass may compute something of whole tensors.
_ENTRY_BY_ENTRY = (Adam, AdamW, SGD)
_TRIES = 3  # to gather states: who moves them again and again, or steps some less often, has them stepped one by one


def may_be_joined(optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a step with these arguments may be joined: nobody looks into it, and no gradient comes within it."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    return (
        type(optimizer) in _ENTRY_BY_ENTRY
        and hasattr(type(optimizer).step, "__wrapped__")  # what is within torch's hooks
        and closure is None
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
        and len(_global_optimizer_pre_hooks) == len(_global_optimizer_post_hooks) == 1  # ours
        and not torch.is_inference_mode_enabled()
        and not any(held.get("differentiable") for held in optimizer.param_groups)
    )


class JoinedSteps:
    """The values of an optimizer that are stepped together: those of a group that are in one of its param groups."""

    def __init__(self, optimizer: Optimizer, groups: list[MaskedGroup]) -> None:
        places = {id(each): place for place, held in enumerate(optimizer.param_groups) for each in held["params"]}
        once = len(places) == sum(len(held["params"]) for held in optimizer.param_groups)
        self._joined = []
        for group in groups:
            values = group.all_values()
            found = {places.get(id(each)) for each in values}
            if len(values) > 1 and len(found) == 1 and None not in found and once:
                self._joined.append(_Joined(group, values, places[id(values[0])]))
        self._ready: list[_Joined] = []
        self._others: list[_Joined] = []

    def begin(self, optimizer: Optimizer) -> None:
        """Hide the gradients of what can be stepped together. An error in the step loses them, and moves nothing."""
        self._ready, self._others = [], []
        for each in self._joined:
            (self._ready if each.is_together(optimizer) else self._others).append(each)
        for each in self._ready:
            each.hide()

    def end(self, optimizer: Optimizer) -> None:
        """Step what was hidden, once the optimizer has stepped the rest."""
        ready, others = self._ready, self._others
        self._ready, self._others = [], []
        for each in ready:
            each.show()
        if ready:
            with torch.no_grad():
                _step([each.whole(optimizer) for each in ready], optimizer)
        for each in others:
            each.gather_states(optimizer)


class _Whole(NamedTuple):
    """A parameter over all values of a group, its state, and what the optimizer has set for it."""

    parameter: nn.Parameter
    state: dict[str, Any]
    counts: dict[str, Tensor]  # by name, the one memory of the counts of steps, of which the state has one
    settings: dict[str, Any]


def _step(wholes: list[_Whole], optimizer: Optimizer) -> None:
    """What the optimizer does in a step, for these: an object that is it in all but parameters and state does it."""
    kind: Any = type(optimizer)
    stepper = kind.__new__(kind)
    vars(stepper).update(vars(optimizer))
    stepper.param_groups = [{**each.settings, "params": [each.parameter]} for each in wholes]
    stepper.state = {each.parameter: each.state for each in wholes}
    kind.step.__wrapped__(stepper)  # without hooks, and not told of to a profiler as a step
    for each in wholes:
        for key, memory in each.counts.items():
            memory.copy_(each.state[key])


class _Joined:
    """The values of one masked group in one optimizer."""

    def __init__(self, group: MaskedGroup, values: list[Any], place: int) -> None:
        self._group = weakref.ref(group)  # an optimizer does not keep the model
        self._values, self._place = values, place
        self._sizes = [each.numel() for each in values]
        self._starts = list(itertools.accumulate(self._sizes[:-1], initial=0))
        self._tries = 0
        self._apart = False  # whether that alone stood in the way of the last step, that its states were not together
        self._versions: list[int] = []  # of the counts of steps, when they were equal
        # For the length of a step: the gradients, and the memories that they and the states are in.
        self._grads: list[Tensor] = []
        self._grad: Tensor | None = None
        self._states: dict[str, tuple[Tensor, bool]] = {}

    def is_together(self, optimizer: Optimizer) -> bool:
        """Whether the values, their gradients and their states are such that they can be stepped as one tensor."""
        group = self._group()
        self._apart = False
        if group is None or group.managed or group.scattered or self._tries > _TRIES:
            return False
        if group.held:
            group.find_flat()
        if group.flat is None or not group.one_count:
            return False
        grads = [each.grad for each in self._values]
        if any(grad is None for grad in grads):
            return False
        memory, states = self._memory_of(grads), self._states_together(optimizer)
        self._apart = states is None
        if states is None or (memory is None and not self._may_be_copied(grads, optimizer)):
            return False
        self._grads, self._grad, self._states = grads, memory, states
        return True

    def _may_be_copied(self, grads: list[Tensor], optimizer: Optimizer) -> bool:
        """Whether gradients may be stepped from copies; a fused step of a GradScaler writes into them."""
        kinds = {(grad.dtype, grad.layout) for grad in grads}
        return kinds == {(self._values[0].dtype, torch.strided)} and getattr(optimizer, "grad_scale", None) is None

    def hide(self) -> None:
        for values in self._values:
            values.grad = None

    def show(self) -> None:
        for values, grad in zip(self._values, self._grads, strict=True):
            values.grad = grad

    def whole(self, optimizer: Optimizer) -> _Whole:
        flat: Any = self._group().flat  # type: ignore[union-attr]
        parameter = nn.Parameter(flat)
        parameter.grad = torch.cat(self._grads) if self._grad is None else self._grad.view_as(parameter)
        state, counts = {}, {}
        for key, (memory, counted) in self._states.items():
            state[key] = memory[0].clone() if counted else memory.view_as(parameter)
            if counted:
                counts[key] = memory
        self._grads, self._grad, self._states = [], None, {}
        return _Whole(parameter, state, counts, optimizer.param_groups[self._place])

    def _memory_of(self, parts: list[Tensor]) -> Any:
        """The one memory of which these are slices, or None."""
        first = parts[0]
        found, size = list(map(Tensor.data_ptr, parts)), first.element_size()
        begin, starts = found[0], self._starts if first.dim() else range(len(parts))
        if found != [begin + start * size for start in starts]:
            return None
        entries = starts[-1] + parts[-1].numel()
        memory = first.untyped_storage()
        if not first.is_contiguous() or begin - memory.data_ptr() + entries * size > memory.nbytes():
            return None
        return first.data.as_strided((entries,), (1,))  # whose changes are not counted as the first part's

    def _states_together(self, optimizer: Optimizer) -> dict[str, tuple[Tensor, bool]] | None:
        """By name, the one memory of the values' states, and whether it counts their steps.

        None where they are not in one, and where one of the values was stepped less often than another.
        """
        states: list[Any] = list(map(optimizer.state.get, self._values))
        if not any(states):
            return None if _has_state(optimizer, self._place) else {}  # which the optimizer makes
        if not all(states) or set(map(len, states)) != {len(states[0])}:
            return None
        found: dict[str, tuple[Tensor, bool]] = {}
        for key in states[0]:
            parts = [state.get(key) for state in states]
            if set(map(type, parts)) != {Tensor}:
                return None
            memory, counted = self._memory_of(parts), not parts[0].dim()
            if memory is None or (counted and not self._are_equal(memory, parts)):
                return None
            found[key] = memory, counted
        return found

    def _are_equal(self, counts: Tensor, parts: list[Tensor]) -> bool:
        """Whether all were stepped as often. A GPU is waited for only where somebody has written one meanwhile."""
        versions = [part._version for part in parts]
        if versions != self._versions:
            self._versions = versions if bool((counts == counts[0]).all()) else []
        return versions == self._versions

    def gather_states(self, optimizer: Optimizer) -> None:
        """Where that alone stood in the way: move the states into one memory. They stay the objects that they are."""
        if not self._apart:
            return
        self._tries += 1
        states = [optimizer.state.get(each) for each in self._values]
        if self._tries > _TRIES or not all(states):
            return
        moved: list[tuple[Tensor, Tensor]] = []
        for key, example in states[0].items():  # type: ignore[union-attr]
            parts: list[Any] = [state.get(key) for state in states if state is not None]
            if not all(isinstance(part, Tensor) for part in parts):
                return
            shapes = [torch.Size()] * len(parts) if _is_count(example) else [each.shape for each in self._values]
            if [part.shape for part in parts] != shapes or len({(part.dtype, part.device) for part in parts}) > 1:
                return
            memory = torch.stack(parts) if _is_count(example) else torch.cat(parts)
            if _is_count(example) and not self._are_equal(memory, parts):
                return
            slices = memory.unbind() if _is_count(example) else memory.split(self._sizes)
            moved += zip(parts, slices, strict=True)
        for part, entries in moved:
            DATA.__set__(part, entries)


def _is_count(state: Any) -> bool:
    """Of steps: one number a parameter."""
    return isinstance(state, Tensor) and not state.dim()


def _has_state(optimizer: Optimizer, place: int) -> bool:
    return type(optimizer) is not SGD or bool(optimizer.param_groups[place]["momentum"])
