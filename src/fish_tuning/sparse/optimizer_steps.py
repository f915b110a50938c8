"""What is done before and after every step of an optimizer, for the masked values that it trains."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fish_tuning.errors import MaskError
from fish_tuning.sparse.values import MaskedGroup, stop_watching, watch_again

# Groups whose values' memory others may hold, such as an engine that trains a copy of the parameters.
held_by_others: weakref.WeakSet[MaskedGroup] = weakref.WeakSet()
_OF_WHOLE_MATRICES = {"LoraFAOptimizer", "RiemannianPreconditionedOptimizer", "Muon"}


def _values_of(optimizer: Optimizer) -> tuple[list[Any], set[MaskedGroup]]:
    """The masked values that an optimizer trains, and their groups."""
    parameters, groups = [], set()
    for held in optimizer.param_groups:
        for parameter in held["params"]:
            reference = getattr(parameter, "masked_group", None)
            group = reference() if reference is not None else None
            if group is not None:
                parameters.append(parameter)
                groups.add(group)
    return parameters, groups


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    """Refuse what would compute something else of values than of the matrix that they are part of; else let go of them.

    torch takes a parameter of a class of its own some microseconds later than an ordinary one, for each of a step's
    operations. What is done through `.data` in a step need not be counted: the values are written after it. A read in
    the middle of it (a closure's) finds its group unsettled, and has them watched again.
    """
    name = type(optimizer).__name__
    parameters, groups = _values_of(optimizer)
    if name in _OF_WHOLE_MATRICES and groups:
        raise MaskError(
            f"{name} computes its steps from whole matrices; of masked tensors it holds selected entries alone. Use "
            "an optimizer that works entry by entry (AdamW, SGD, LoRA+), or remove_mask(model) first."
        )
    for group in groups:
        group.stale, group.settled = True, False
    for parameter in parameters:
        stop_watching(parameter)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    """After every step of every optimizer of the process."""
    parameters, groups = _values_of(optimizer)
    for parameter in parameters:
        watch_again(parameter)
    for group in groups:
        group.write()  # now, because compiled models do not look whether they are out of date
    for group in held_by_others:
        if group not in groups:
            group.stale, group.settled = True, False


@functools.cache
def watch_optimizers() -> None:
    """Once there is something masked. A compiled step leaves these as they are."""
    register_optimizer_step_pre_hook(torch.compiler.disable(_before_step))
    register_optimizer_step_post_hook(torch.compiler.disable(_after_step))
