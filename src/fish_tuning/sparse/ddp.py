"""Several processes that choose again: DDP reduces the gradients of what it found when it was made, and no others."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fish_tuning.errors import MaskError


def renew_ddp(model: nn.Module) -> None:
    """Have every DDP wrapper of `model` reduce what trains now; all processes must do so at the same time."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for wrapper in _wrappers_of(model):
        hooks = list(wrapper._comm_hooks)
        wrapper._comm_hooks.clear()
        wrapper._module_parameters = [
            parameter for name, parameter in model.named_parameters() if name not in wrapper.parameters_to_ignore
        ]
        # What unpickling does: a new reducer for the parameters that are there.
        wrapper.__setstate__(wrapper.__getstate__())
        for hook, state in hooks:
            wrapper.register_comm_hook(state, hook)


@contextmanager
def together() -> Iterator[None]:
    """What all processes do at the same time: where one fails, all do, since the others would wait for it for ever."""
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        told: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, None if failed is None else f"{type(failed).__name__}: {failed}")
        first = next((number for number, error in enumerate(told) if error is not None), None)
        if failed is None and first is not None:
            raise MaskError(f"Process {first} of {len(told)} failed: {told[first]}")
    if failed is not None:
        raise failed


def _wrappers_of(model: nn.Module) -> Iterator[DistributedDataParallel]:
    # A model does not know of its wrapper, nor do a Trainer's callbacks.
    for held in gc.get_objects():
        if issubclass(type(held), DistributedDataParallel) and getattr(held, "module", None) is model:
            yield held
