"""What is done before and after every step of an optimizer, for the masked values that it trains."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakTensorKeyDictionary

from fish_tuning.errors import MaskError
from fish_tuning.sparse.joined_steps import JoinedSteps, may_be_joined
from fish_tuning.sparse.values import MaskedGroup, stop_watching, watch_again

# Groups whose values' memory others may hold, such as an engine that trains a copy of the parameters.
held_by_others: weakref.WeakSet[MaskedGroup] = weakref.WeakSet()
# Parameters in whose places others train since masks came or went.
_replaced: MutableMapping[Tensor, weakref.ref[Any]] = WeakTensorKeyDictionary()
# Modules with masked tensors, by id, and their method that tells of whole parameters that an optimizer holds of them.
masked_modules: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
CHECK_HELD = "_fish_tuning_check_held"
_AFTER_OTHERS = "fish_tuning"  # the key of our hook among those that an optimizer has before its steps
_OF_WHOLE_MATRICES = {"LoraFAOptimizer", "RiemannianPreconditionedOptimizer"}  # and Muon


class _Trained(NamedTuple):
    """All that an optimizer trains, and which of it are masked values, of which groups."""

    parameters: list[Any]
    in_each: list[int]  # how many of them are in each of the optimizer's param groups
    values: list[Any]
    groups: list[weakref.ref[MaskedGroup]]
    joined: JoinedSteps

    def living_groups(self) -> list[MaskedGroup]:
        return [group for reference in self.groups if (group := reference()) is not None]

    def let_go(self, groups: list[MaskedGroup]) -> None:
        for group in groups:
            group.take_written()  # or the values would move from where they were before
            group.stale, group.settled = True, False
        stop_watching(self.values)


# To look at each of hundreds of parameters costs more than to see that they are those of the step before.
_trained: weakref.WeakKeyDictionary[Optimizer, _Trained] = weakref.WeakKeyDictionary()
_in_step: weakref.WeakKeyDictionary[Optimizer, _Trained] = weakref.WeakKeyDictionary()


def note_replaced(parameter: Tensor, by: Any) -> None:
    """A masked tensor trains in this parameter's place, or a whole one again in that of values.

    An optimizer that has the one and not the other trains nothing of it.
    """
    if isinstance(by, Tensor):
        _replaced.pop(by, None)
    _replaced[parameter] = weakref.ref(by)


def hand_on_replaced(parameter: Tensor, before: Tensor) -> None:
    """What trains in the parameter's place does so in that of the one that an engine had there before."""
    if parameter in _replaced:
        _replaced[before] = _replaced[parameter]


def look_again() -> None:
    """Masked values have got groups since optimizers were looked at."""
    _trained.clear()


def _trained_by(optimizer: Optimizer) -> _Trained:
    known = _trained.get(optimizer)
    parameters = [parameter for held in optimizer.param_groups for parameter in held["params"]]
    in_each = [len(held["params"]) for held in optimizer.param_groups]
    if known is None or known.in_each != in_each or not all(map(operator.is_, known.parameters, parameters)):
        _check_holds_what_trains(optimizer, parameters)
        values = [each for each in parameters if getattr(each, "masked_group", None) is not None]
        groups = list(dict.fromkeys(each.masked_group for each in values))
        living = [group for reference in groups if (group := reference()) is not None]
        if living:
            _check_takes_vectors(optimizer)
        joined = JoinedSteps(optimizer, living)
        known = _trained[optimizer] = _Trained(parameters, in_each, values, groups, joined)
    return known


def _check_holds_what_trains(optimizer: Optimizer, parameters: list[Any]) -> None:
    held = set(map(id, parameters))
    for module in list(masked_modules.values()):
        if (check := getattr(type(module), CHECK_HELD, None)) is not None:  # else the mask is off
            check(module, held)
    for parameter in parameters:
        now: Any = _replaced[parameter]() if parameter in _replaced else None
        if now is None:
            continue
        back = isinstance(now, Tensor)
        trains = now if back else now.values
        if trains is None or not trains.requires_grad or id(trains) in held:
            continue
        what, when = ("the whole tensor", "remove_mask") if back else ("its selected entries", "apply_mask")
        raise MaskError(
            f"{type(optimizer).__name__} was made before {when}: of a tensor of shape {tuple(now.shape)} it does not "
            f"hold {what}, so it would train nothing of it. Make the optimizer after {when}; replace_mask(model, mask, "
            "optimizer) changes masks between two steps."
        )


def _check_takes_vectors(optimizer: Optimizer) -> None:
    names = [kind.__name__ for kind in type(optimizer).__mro__]  # a subclass steps as the class does that it is of
    if not any(name in _OF_WHOLE_MATRICES or name.startswith("Muon") for name in names):
        return
    for held in optimizer.param_groups:
        # Classes with an Adam beside Muon say so of each group.
        if held.get("use_muon", True) and any(
            getattr(each, "masked_group", None) is not None for each in held["params"]
        ):
            raise MaskError(
                f"{names[0]} computes its steps from whole matrices; of masked tensors it holds selected entries "
                "alone. Use an optimizer that works entry by entry (AdamW, SGD, LoRA+), or remove_mask(model) first."
            )


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before every step of every optimizer of the process."""
    # A compiled step is one for all tensors anyway, and would be compiled again for each optimizer in its place.
    return _uncompiled(optimizer, args, kwargs, joins=not torch.compiler.is_compiling())


def _prepare(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], joins: bool) -> Any:
    """Refuse what would compute something else of values than of the matrix that they are part of; else let go of them.

    Before that they take what was written into their tensors (an embedding's `max_norm`, a clamp) and not read since.
    torch takes a parameter of a class of its own some microseconds later than an ordinary one, for each of a step's
    operations. What is done through `.data` in a step need not be counted: the values are written after it. A read in
    the middle of it (a closure's) finds its group unsettled, and has them watched again.
    """
    trained = _trained_by(optimizer)
    groups = trained.living_groups()
    trained.let_go(groups)
    _in_step[optimizer] = trained
    if not joins or not groups:
        return None
    if may_be_joined(optimizer, args, kwargs):
        stepper = trained.joined.stepper(optimizer)
        return None if stepper is None else ((stepper, *args[1:]), kwargs)
    hooks = optimizer._optimizer_step_pre_hooks
    hooks.pop(_AFTER_OTHERS, None)  # type: ignore[call-overload]
    if hooks or len(_global_optimizer_pre_hooks) > 1:
        hooks[_AFTER_OTHERS] = _let_go_again  # type: ignore[index]  # torch comes to these after the process's
    return _with_closure(optimizer, args, kwargs)


def _let_go_again(optimizer: Optimizer, *_: Any) -> None:
    """Other hooks before the step may have written into tensors; ours for all optimizers comes before them."""
    if (trained := _in_step.get(optimizer)) is not None:
        trained.let_go(trained.living_groups())


def _with_closure(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a step, where it has a closure with one after which the values are as it leaves the tensors."""
    closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        return None

    @functools.wraps(closure)
    def followed() -> Any:
        result = closure()
        _let_go_again(optimizer)
        return result

    return ((args[0], followed, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": followed})


_uncompiled: Any = torch.compiler.disable(_prepare)


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], _: dict[str, Any]) -> None:
    """After every step of every optimizer of the process."""
    trained = _in_step.pop(optimizer, None)
    if trained is None:
        return
    optimizer._optimizer_step_pre_hooks.pop(_AFTER_OTHERS, None)  # type: ignore[call-overload]
    trained.joined.end(optimizer, args[0])
    watch_again(trained.values)
    groups = trained.living_groups()
    in_place = type(optimizer).__module__.startswith("torch.optim.")
    for group in groups:
        if not in_place:
            group.notice_moved()
        if not group.stale:  # somebody has read them within the step, after which weights may have been clipped
            group.take_last()
        group.write()  # now, because compiled models do not look whether they are out of date
        group.end_step()
    for group in held_by_others:
        if group not in groups:
            group.stale, group.settled = True, False


@functools.cache
def watch_optimizers() -> None:
    """Once there is something masked. A compiled step leaves these as they are."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(torch.compiler.disable(_after_step))
