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
    """Have every DDP wrapper that has modules of `model` reduce what trains now.

    It waits for no other process; but each that trains the model must do so between the same two steps.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    for wrapper in _wrappers_of(model):
        hooks = list(wrapper._comm_hooks)
        wrapper._comm_hooks.clear()
        wrapper._module_parameters = [
            parameter
            for name, parameter in wrapper.module.named_parameters()
            if name not in wrapper.parameters_to_ignore
        ]
        # What unpickling does, but in the wrapper's own process group: a new reducer for the parameters that are there.
        if not any(parameter.requires_grad for parameter in wrapper._module_parameters):
            continue  # a mask without an entry: there is nothing to reduce, and DDP takes nothing
        parameters, sparse = wrapper._build_params_for_reducer()
        names = wrapper._build_debug_param_to_name_mapping(parameters)
        wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
        if wrapper.static_graph:
            wrapper.reducer._set_static_graph()
            wrapper.logger._set_static_graph()  # type: ignore[union-attr]  # made with the reducer
            # The first step shows the new reducer the graph, and has its gradients reduced at the end.
            wrapper._static_graph_delay_allreduce_enqueued = False
        wrapper._has_rebuilt_buckets = False
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
    # A model does not know of its wrapper, nor do a Trainer's callbacks. What is wrapped may hold the model, or be a
    # part of it.
    own = {id(module) for module in model.modules() if module._parameters}
    kinds = {DistributedDataParallel, *_classes_derived_from(DistributedDataParallel)}
    for held in [each for each in gc.get_objects() if type(each) in kinds]:  # of half a million objects
        wrapped = getattr(held, "module", None)
        if wrapped is not None and any(id(module) in own for module in wrapped.modules()):
            yield held


def _classes_derived_from(kind: type[nn.Module]) -> Iterator[type[nn.Module]]:
    derived: type[nn.Module]
    for derived in type.__subclasses__(kind):
        yield derived
        yield from _classes_derived_from(derived)
