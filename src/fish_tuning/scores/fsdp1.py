"""FSDP1 (`FullyShardedDataParallel`): it gathers the whole model, and its wrappers are stepped around."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from fish_tuning.errors import FisherError
from fish_tuning.model_walks import every_module
from fish_tuning.sparse.sharding import FSDP1, engine_of, plain_name


@contextmanager
def without_fsdp1(model: nn.Module) -> Iterator[nn.Module]:
    """The model as if FSDP1 had never had it, its tensors whole on every process, until this is left.

    FSDP1 cannot gather layer by layer for passes that it does not see to the end (it reduces gradients in them), so it
    gathers all at once; what is changed meanwhile it forgets. All processes must enter this. Any other model is left
    alone.

    Raises FisherError within a pass or a `summon_full_params`, and where FSDP1 holds gradients of an unfinished step.
    """
    wrappers: list[Any] = [module for module in every_module(model) if _is_wrapper(module)]
    if not wrappers:
        yield model
        return
    for wrapper in wrappers:
        _check_idle(wrapper)
    with ExitStack() as stack:
        stack.enter_context(type(wrappers[0]).summon_full_params(model, writeback=False))
        for parameter in {each for wrapper in wrappers for each in wrapper.parameters()}:
            if engine_of(parameter) == FSDP1:  # what lies outside of all wrappers is still flat, and says so
                stack.callback(setattr, parameter, "_fsdp_flattened", True)
                parameter._fsdp_flattened = False
        for module in list(model.modules()):
            for name, child in module._modules.items():
                if child is not None and not _is_wrapper(module) and _is_wrapper(child):
                    stack.callback(module._modules.__setitem__, name, child)
                    module._modules[name] = _within(child)
        yield _within(model)


def _is_wrapper(module: nn.Module) -> bool:
    """By name, since FSDP1 is not loaded where nobody uses it."""
    return type(module).__name__ == "FullyShardedDataParallel"


def _within(module: Any) -> nn.Module:
    while _is_wrapper(module):
        module = module._fsdp_wrapped_module
    found: nn.Module = module
    return found


def _check_idle(wrapper: Any) -> None:
    if wrapper.training_state.name != "IDLE":
        raise FisherError(
            "FSDP1 is within a pass or a summon_full_params, and cannot gather the model for another. Score outside."
        )
    handle = wrapper._handle
    if handle is not None and handle.uses_sharded_strategy and _holds_whole_gradients(handle.flat_param):
        name = plain_name(handle.flat_param._fqns[0])
        raise FisherError(
            f"{name!r} and what FSDP1 keeps with it hold gradients that it has not reduced (no_sync). Score before or "
            "after the accumulation of a step, not within."
        )


def _holds_whole_gradients(flat: Any) -> bool:
    return flat.grad is not None and flat.grad.numel() > flat._local_shard.numel()
