"""Masked values that lie in one memory are stepped as one tensor, by optimizers that work entry by entry.

What hundreds of small tensors cost an optimizer is looking at each of them, not their entries. So its step is handed
another optimizer, the same in all but that one parameter, over all values of a group, stands for them, with another
tensor over their gradients, and others over their states. Nothing of it is kept: the values are the parameters, the
optimizer has the state of each, and only the memory of these states is moved once, so that they lie together. Where
anything lies elsewhere than expected, or one of the values was stepped less often, the optimizer steps each as ever.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
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
        self._joined: list[_Joined] = []
        for group in groups:
            values = group.all_values()
            found = {places.get(id(each)) for each in values}
            if len(values) > 1 and len(found) == 1 and None not in found and once:
                self._joined.append(_Joined(group, values, places[id(values[0])]))
        joined = {id(values) for each in self._joined for values in each.values}
        self._rest = [[each for each in held["params"] if id(each) not in joined] for held in optimizer.param_groups]
        self._stepper: Optimizer | None = None  # for the length of a step, as are these:
        self._ready: list[_Whole] = []
        self._others: list[_Joined] = []

    def stepper(self, optimizer: Optimizer) -> Optimizer | None:
        """The optimizer, but with one parameter in the place of values that can be stepped together, if any can be."""
        self._ready, self._others = [], []
        params = [list(rest) for rest in self._rest]
        for each in self._joined:
            whole = each.whole(optimizer)
            if whole is None:
                self._others.append(each)
                params[each.place] += each.values
            else:
                self._ready.append(whole)
                params[each.place].append(whole.parameter)
        if not self._ready:
            return None
        kind = type(optimizer)
        stepper = kind.__new__(kind)
        vars(stepper).update(vars(optimizer))
        stepper.param_groups = [
            {**held, "params": own} for held, own in zip(optimizer.param_groups, params, strict=True)
        ]
        rest = {each: optimizer.state[each] for own in params for each in own if each in optimizer.state}
        stepper.state = defaultdict(dict, rest | {each.parameter: each.state for each in self._ready})
        self._stepper = stepper
        return stepper

    def end(self, optimizer: Optimizer) -> None:
        """What is left to do for values and states once all is stepped."""
        self.hand_back(optimizer)
        others, self._others = self._others, []
        for each in others:
            each.gather_states(optimizer)

    def hand_back(self, optimizer: Optimizer) -> None:
        """Have the optimizer's states follow those of the one that stepped in its place, if it has."""
        stepper, ready = self._stepper, self._ready
        self._stepper, self._ready = None, []
        if stepper is None:
            return
        for whole in ready:
            stepper.state.pop(whole.parameter)  # whose memory theirs is, but for the counts of steps
            for key, memory in whole.counts.items():
                memory.copy_(whole.state[key])
        new = {each: state for each, state in stepper.state.items() if each not in optimizer.state}
        if new:  # after an error in a step, something may have been taken out since
            held = {id(each) for held in optimizer.param_groups for each in held["params"]}
            optimizer.state.update({each: state for each, state in new.items() if id(each) in held})


class _Whole(NamedTuple):
    """A parameter over all values of a group, and its state."""

    parameter: nn.Parameter
    state: dict[str, Any]
    counts: dict[str, Tensor]  # by name, the one memory of the counts of steps, of which the state has one


class _Joined:
    """The values of one masked group in one optimizer."""

    def __init__(self, group: MaskedGroup, values: list[Any], place: int) -> None:
        self._group = weakref.ref(group)  # an optimizer does not keep the model
        self.values, self.place = values, place  # in which of the optimizer's param groups they are
        self._sizes = [each.numel() for each in values]
        ends = np.cumsum(self._sizes, dtype=np.uint64)
        self._starts, self._entries = ends - np.array(self._sizes, np.uint64), int(ends[-1])
        self._tries = 0
        self._apart = False  # whether that alone stood in the way of the last step, that its states were not together
        self._versions: list[int] = []  # of the counts of steps, when they were equal

    def whole(self, optimizer: Optimizer) -> _Whole | None:
        """The values as one parameter, unless they, their gradients or their states are not such as can be one."""
        group = self._group()
        self._apart = False
        if group is None or group.managed or group.scattered or self._tries > _TRIES:
            return None
        if group.held:
            group.find_flat()
        if group.flat is None or not group.one_count:
            return None
        grads: list[Any] = [each.grad for each in self.values]
        if set(map(type, grads)) != {Tensor}:
            return None
        memory, states = self._memory_of(grads), self._states_together(optimizer)
        self._apart = states is None
        if states is None or (memory is None and not self._may_be_copied(grads, optimizer)):
            return None
        parameter = nn.Parameter(group.flat)
        parameter.grad = torch.cat(grads).detach() if memory is None else memory.view_as(parameter)
        counts = {key: memory for key, (memory, counted) in states.items() if counted}
        state = {key: memory.view_as(parameter) for key, (memory, counted) in states.items() if not counted}
        return _Whole(parameter, state | {key: memory[0].clone() for key, memory in counts.items()}, counts)

    def _may_be_copied(self, grads: list[Tensor], optimizer: Optimizer) -> bool:
        """Whether gradients may be stepped from copies; a fused step of a GradScaler writes into them."""
        kinds = {(grad.dtype, grad.layout) for grad in grads}
        return kinds == {(self.values[0].dtype, torch.strided)} and getattr(optimizer, "grad_scale", None) is None

    def _memory_of(self, parts: list[Tensor]) -> Any:
        """The one memory of which these are slices, or None."""
        first, counted = parts[0], not parts[0].dim()
        size, entries = first.element_size(), len(parts) if counted else self._entries
        found = np.fromiter(map(Tensor.data_ptr, parts), np.uint64, len(parts))
        starts = np.arange(len(parts), dtype=np.uint64) if counted else self._starts
        if not np.array_equal(found - found[0], starts * np.uint64(size)):
            return None
        memory = first.untyped_storage()
        if not first.is_contiguous() or first.data_ptr() - memory.data_ptr() + entries * size > memory.nbytes():
            return None
        return first.data.as_strided((entries,), (1,))  # whose changes are not counted as the first part's

    def _states_together(self, optimizer: Optimizer) -> dict[str, tuple[Tensor, bool]] | None:
        """By name, the one memory of the values' states, and whether it counts their steps.

        None where they are not in one, and where one of the values was stepped less often than another.
        """
        states: list[Any] = list(map(optimizer.state.get, self.values))
        if not any(states):
            return None if _has_state(optimizer, self.place) else {}  # which the optimizer makes
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
        states = [optimizer.state.get(each) for each in self.values]
        if self._tries > _TRIES or not all(states):
            return
        moved: list[tuple[Tensor, Tensor]] = []
        for key, example in states[0].items():  # type: ignore[union-attr]
            parts: list[Any] = [state.get(key) for state in states if state is not None]
            if not all(isinstance(part, Tensor) for part in parts):
                return
            shapes = [torch.Size()] * len(parts) if _is_count(example) else [each.shape for each in self.values]
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
