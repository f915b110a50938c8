"""Masked values that lie in one memory are stepped as one tensor, by optimizers that work entry by entry.

What hundreds of small tensors cost an optimizer is looking at each of them, not their entries. So another optimizer of
the same class steps one parameter over all values of a group before the real one begins, which then finds no gradient
there. All that others see stays as it was: the values are the parameters, and the state of each is a slice of the whole
state, whether a step was joined or not.
"""

from __future__ import annotations

import inspect
import itertools
import operator
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fish_tuning.sparse.values import MaskedGroup

# By the class itself: a subclass may compute something of whole tensors.
_ENTRY_BY_ENTRY = (Adam, AdamW, SGD)
_OF_GRAD_SCALER = ("grad_scale", "found_inf")  # what it tells a fused optimizer for the length of a step
# The optimizers that step for others.
steppers: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def works_entry_by_entry(optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a step with these arguments may be joined: nobody looks into it, and no gradient comes within it."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    return (
        type(optimizer) in _ENTRY_BY_ENTRY
        and closure is None
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
        and not any(held.get("differentiable") for held in optimizer.param_groups)
    )


class JoinedSteps:
    """The values of an optimizer that are stepped together: those of a group that are in one of its param groups."""

    def __init__(self, optimizer: Optimizer, groups: list[MaskedGroup]) -> None:
        places = {id(each): place for place, held in enumerate(optimizer.param_groups) for each in held["params"]}
        self._joined = []
        for group in groups:
            values = group.all_values()
            found = {places.get(id(each)) for each in values}
            if len(values) > 1 and len(found) == 1 and None not in found:
                self._joined.append(_Joined(group, values, places[id(values[0])]))
        self._stepper: Optimizer | None = None
        self._hidden: list[tuple[Any, Tensor]] = []

    def step(self, optimizer: Optimizer) -> None:
        """Step what can be stepped together, and hide its gradients until `end`."""
        self._hidden = []
        ready = [each for each in self._joined if each.prepare(optimizer)]
        if not ready:
            return
        stepper = self._stepper_for(optimizer, ready)
        stepper.step()
        for each in ready:
            each.hand_out(optimizer, stepper)
            self._hidden += zip(each.values, each.grads, strict=True)
            each.grads, each.whole.grad = [], None
        for values, _ in self._hidden:
            values.grad = None

    def end(self) -> None:
        """The real optimizer's step is over."""
        for values, grad in self._hidden:
            values.grad = grad
        self._hidden = []

    def _stepper_for(self, optimizer: Optimizer, ready: list[_Joined]) -> Optimizer:
        """An optimizer of the same class and settings, whose parameters are these."""
        if self._stepper is None:
            known = inspect.signature(type(optimizer)).parameters
            own = {name: value for name, value in optimizer.defaults.items() if name in known}
            self._stepper = type(optimizer)([nn.Parameter(torch.zeros(()))], **own)
            steppers.add(self._stepper)
        self._stepper.param_groups = [{**optimizer.param_groups[each.place], "params": [each.whole]} for each in ready]
        self._stepper.state.clear()
        self._stepper.state.update({each.whole: dict(each.state) for each in ready if each.state})
        for name in _OF_GRAD_SCALER:
            if hasattr(optimizer, name):
                setattr(self._stepper, name, getattr(optimizer, name))
            elif hasattr(self._stepper, name):
                delattr(self._stepper, name)
        return self._stepper


class _Joined:
    """The values of one masked group, and the state that an optimizer has of them, as one tensor each."""

    def __init__(self, group: MaskedGroup, values: list[Any], place: int) -> None:
        self._group = weakref.ref(group)  # an optimizer does not keep the model
        self.values, self.place = values, place
        self.sizes = [each.numel() for each in values]
        starts = itertools.accumulate(self.sizes[:-1], initial=0)
        self._starts = [start * values[0].element_size() for start in starts]
        self._flat: Tensor | None = None
        self.whole: Any = None  # a parameter over all values
        self.grads: list[Tensor] = []
        self.state: dict[str, Any] = {}  # of `whole`
        self._parts: list[dict[str, Any]] = []  # of each of the values, as it was handed out
        self._counts: dict[str, tuple[Tensor, int]] = {}  # the counts of steps of all values, and their version then

    def prepare(self, optimizer: Optimizer) -> bool:
        """Whether the values, their gradients and their states are whole tensors; `whole` has them then."""
        group = self._group()
        if group is None or group.managed or group.scattered:
            return False
        if group.held:
            group.find_flat()
        if group.flat is None or not group.one_count:
            return False
        grads = [each.grad for each in self.values]
        if any(grad is None for grad in grads) or not self._join_state(optimizer):
            return False
        if self._flat is not group.flat:
            self._flat, self.whole = group.flat, nn.Parameter(group.flat)
        self.grads = grads
        self.whole.grad = self._joined_grad(grads)
        return True

    def _joined_grad(self, grads: list[Tensor]) -> Tensor:
        first, shape = grads[0], self.whole.shape
        begin = first.data_ptr()
        if [grad.data_ptr() - begin for grad in grads] == self._starts and first.is_contiguous():
            memory = first.untyped_storage()
            if begin - memory.data_ptr() + self.whole.numel() * first.element_size() <= memory.nbytes():
                return first.detach().as_strided(shape, self.whole.stride())
        return torch.cat(grads)

    def _join_state(self, optimizer: Optimizer) -> bool:
        """See that `state` is that of the values; whether it is."""
        states: list[dict[str, Any]] = [optimizer.state.get(each, {}) for each in self.values]
        if self._parts and all(map(_same_state, states, self._parts)):
            return all(counts._version == seen for counts, seen in self._counts.values()) or self._count_again()
        self.state, self._parts, self._counts = {}, [], {}
        if not any(states):
            return True
        state = _joined_state(states, [each.shape for each in self.values])
        if state is None:
            return False
        self.state = state
        self._hand_out_parts(optimizer)
        return True

    def _count_again(self) -> bool:
        """The values were stepped one by one meanwhile: whether all as often."""
        if any(len(counts.unique()) > 1 for counts, _ in self._counts.values()):
            return False
        for key, (counts, _) in self._counts.items():
            self.state[key].copy_(counts[0])
        return True

    def hand_out(self, optimizer: Optimizer, stepper: Optimizer) -> None:
        """After a step, each of the values has its part of the state."""
        state = stepper.state.get(self.whole, {})
        if state and not (self._parts and _same_state(state, self.state)):
            self.state = state
            self._hand_out_parts(optimizer)
        for key, (counts, _) in self._counts.items():
            counts.copy_(state[key])
            self._counts[key] = counts, counts._version

    def _hand_out_parts(self, optimizer: Optimizer) -> None:
        parts: list[dict[str, Any]] = [{} for _ in self.values]
        self._counts = {}
        for key, whole in self.state.items():
            each: Sequence[Any] = [whole] * len(parts)
            if isinstance(whole, Tensor) and whole.dim():
                each = whole.split(self.sizes)
            elif isinstance(whole, Tensor):
                counts = whole.repeat(len(parts))
                self._counts[key] = counts, counts._version
                each = counts.unbind()
            for part, entries in zip(parts, each, strict=True):
                part[key] = entries
        for values, part in zip(self.values, parts, strict=True):
            optimizer.state[values] = part
        self._parts = [dict(part) for part in parts]


def _joined_state(states: list[dict[str, Any]], shapes: list[torch.Size]) -> dict[str, Any] | None:
    """The states of tensors of these shapes as that of one tensor; None where they are too unlike for it."""
    first = states[0]
    if any(state.keys() != first.keys() for state in states):
        return None
    joined: dict[str, Any] = {}
    for key, example in first.items():
        parts = [state[key] for state in states]
        if not isinstance(example, Tensor):
            alike, joined[key] = all(part == example for part in parts), example
        elif example.dim():
            kinds = {(part.dtype, part.device) for part in parts}
            alike = len(kinds) == 1 and [part.shape for part in parts] == shapes
            joined[key] = torch.cat(parts) if alike else None
        else:
            alike, joined[key] = len(torch.stack(parts).unique()) == 1, example.clone()
        if not alike:
            return None
    return joined


def _same_state(state: dict[str, Any], known: dict[str, Any]) -> bool:
    return len(state) == len(known) and all(map(operator.is_, state.values(), known.values()))
