"""Masked values that lie in one memory are stepped as one tensor, by optimizers that work entry by entry.

What hundreds of small tensors cost an optimizer is looking at each of them, not their entries. So its step is handed
another optimizer, the same in all but that one parameter, over all values of a group, stands for them, with another
tensor over their gradients, and others over their states. Nothing of it is kept: the values are the parameters, the
optimizer has the state of each, and only the memory of these states is moved once, so that they lie together. Where
anything lies elsewhere than expected, or one of the values was stepped less often, the optimizer steps each as ever.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fish_tuning.errors import MaskError
from fish_tuning.sparse.values import DATA, MaskedGroup

# By the class itself: a subclass may compute something of whole tensors.
_ENTRY_BY_ENTRY = (Adam, AdamW, SGD)
_DTYPE: Any = Tensor.dtype.__get__  # type: ignore[attr-defined]
_LAYOUT: Any = Tensor.layout.__get__  # type: ignore[attr-defined]
_WHOLES = "_fish_tuning_wholes"  # what belongs to one step is the stepper's own, and ends with it, by an error too
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

    def stepper(self, optimizer: Optimizer) -> Optimizer | None:
        """The optimizer, but with one parameter in the place of values that can be stepped together, if any can be.

        These come last: an error in a step of the others moves nothing of them.
        """
        rest, wholes = [list(each) for each in self._rest], dict[int, list[_Whole]]()
        for each in self._joined:
            whole = each.whole(optimizer)
            if whole is None:
                rest[each.place] += each.values
            else:
                wholes.setdefault(each.place, []).append(whole)
        if not wholes:
            return None
        held = optimizer.param_groups
        stepper = _twin(optimizer)
        stepper.param_groups = [{**held[place], "params": own} for place, own in enumerate(rest) if own]
        stepper.param_groups += [
            {**held[place], "params": [whole.parameter for whole in own]} for place, own in wholes.items()
        ]
        every = [whole for own in wholes.values() for whole in own]
        stepper.state = _States({each.parameter: each.state for each in every}, optimizer.state)  # type: ignore[assignment]
        vars(stepper)[_WHOLES] = every
        return stepper

    def end(self, optimizer: Optimizer, stepper: Any) -> None:
        """What is left to do for states, once the optimizer, or another in its place, has stepped all."""
        for whole in vars(stepper).get(_WHOLES, ()):
            whole.hand_back(optimizer)
        for each in self._joined:
            each.gather_states(optimizer)


def _twin(optimizer: Optimizer) -> Optimizer:
    kind = type(optimizer)
    twin = kind.__new__(kind)
    vars(twin).update(vars(optimizer))
    return twin


class _States(dict[Any, Any]):
    """States of parameters over all values; any other parameter has its own where it always has it."""

    def __init__(self, own: dict[Any, Any], others: Any) -> None:
        super().__init__(own)
        self._others = others

    def __missing__(self, parameter: Any) -> Any:
        return self._others[parameter]


class _Whole(NamedTuple):
    """A parameter over all values of a group, and its state."""

    joined: _Joined
    parameter: nn.Parameter
    state: dict[str, Any]
    memories: dict[str, Tensor]  # by name, what of the state is in the memory of the values' own
    counts: dict[str, Tensor]  # by name, the one memory of the counts of steps, of which the state has one

    def hand_back(self, optimizer: Optimizer) -> None:
        """What is not in the memory of the values' own states: counts of steps, and what is new."""
        for key, now in self.state.items():
            if key in self.counts:
                self.counts[key].copy_(now)
            elif now is not self.memories.get(key):
                for values, part in zip(self.joined.values, self.joined.parts_of(now), strict=True):
                    optimizer.state[values][key] = part


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
        self._counts: list[Tensor] = []  # of steps, when they were equal, and how often each was changed by then
        self._versions: list[int] = []

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
        if set(map(type, grads)) != {Tensor} or set(map(_DTYPE, grads)) != {group.flat.dtype}:
            return None
        if set(map(_LAYOUT, grads)) != {torch.strided}:
            raise MaskError(
                "The selected entries of a masked tensor have a sparse gradient, which torch's optimizers would write "
                "past their end. Set a dense one: gradient.to_dense()."
            )
        held = optimizer.param_groups[self.place]
        if type(optimizer) is SGD and held.get("fused") and grads[0].element_size() == 2:
            return None  # on a CPU, torch's kernel is right for a few entries alone
        memory, states = self._memory_of(grads), self._states_together(optimizer)
        self._apart = states is None
        # What a step writes into gradients, copies would not tell of: a GradScaler's fused one, and Nesterov's.
        nesterov = held.get("nesterov") and held.get("foreach") is not False
        writes = nesterov or getattr(optimizer, "grad_scale", None) is not None
        if states is None or (memory is None and writes):
            return None
        parameter = nn.Parameter(group.flat)
        parameter.grad = torch.cat(grads).detach() if memory is None else memory.view_as(parameter)
        counts = {key: memory for key, (memory, counted) in states.items() if counted}
        memories = {key: memory.view_as(parameter) for key, (memory, counted) in states.items() if not counted}
        state = memories | {key: memory[0].clone() for key, memory in counts.items()}
        return _Whole(self, parameter, state, memories, counts)

    def parts_of(self, state: Any) -> list[Any]:
        """Each one's of a state of all, in memory that stays together."""
        if not isinstance(state, Tensor):
            return [state] * len(self.values)
        if _is_count(state):
            return list(state.expand(len(self.values)).clone().unbind())
        return list(state.split(self._sizes))

    def _memory_of(self, parts: list[Tensor]) -> Any:
        """The one memory of which these are slices, or None."""
        first, counted = parts[0], not parts[0].dim()
        size, entries = first.element_size(), len(parts) if counted else self._entries
        found = np.fromiter(map(Tensor.data_ptr, parts), np.uint64, len(parts))
        starts = np.arange(len(parts), dtype=np.uint64) if counted else self._starts
        if not np.array_equal(found - found[0], starts * np.uint64(size)) or not all(map(Tensor.is_contiguous, parts)):
            return None
        memory = first.untyped_storage()
        if first.data_ptr() - memory.data_ptr() + entries * size > memory.nbytes():
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
        if versions != self._versions or not all(map(operator.is_, parts, self._counts)):
            equal = bool((counts == counts[0]).all())
            self._counts, self._versions = (parts, versions) if equal else ([], [])
            return equal
        return True

    def gather_states(self, optimizer: Optimizer) -> None:
        """Where that alone stood in the way: move the states into one memory. They stay the objects that they are."""
        apart, self._apart = self._apart, False
        if not apart:
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
