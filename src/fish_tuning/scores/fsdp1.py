"""FSDP1 (`FullyShardedDataParallel`): it gathers the whole model, and its wrappers are stepped around."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from fish_tuning.errors import FisherError
from fish_tuning.sparse.fsdp1 import check_idle, is_wrapper, wrappers_of
from fish_tuning.sparse.sharding import FSDP1, engine_of


@contextmanager
def without_fsdp1(model: nn.Module) -> Iterator[nn.Module]:
    """The model as if FSDP1 had never had it, its tensors whole on every process, until this is left.

    FSDP1 cannot gather layer by layer for passes that it does not see to the end (it reduces gradients in them), so it
    gathers all at once; what is changed meanwhile it forgets. All processes must enter this. Any other model is left
    alone.

    Raises FisherError within a pass or a `summon_full_params`, and where FSDP1 holds gradients of an unfinished step.
    """
    wrappers = wrappers_of(model)
    if not wrappers:
        yield model
        return
    for wrapper in wrappers:
        check_idle(wrapper, "Score", FisherError)
    with ExitStack() as stack:
        stack.enter_context(type(wrappers[0]).summon_full_params(model, writeback=False))
        for parameter in {each for wrapper in wrappers for each in wrapper.parameters()}:
            if engine_of(parameter) == FSDP1:  # what lies outside of all wrappers is still flat, and says so
                stack.callback(setattr, parameter, "_fsdp_flattened", True)
                parameter._fsdp_flattened = False
        for module in list(model.modules()):
            for name, child in module._modules.items():
                if child is not None and not is_wrapper(module) and is_wrapper(child):
                    stack.callback(module._modules.__setitem__, name, child)
                    module._modules[name] = _within(child)
        yield _within(model)


def _within(module: Any) -> nn.Module:
    while is_wrapper(module):
        module = module._fsdp_wrapped_module
    found: nn.Module = module
    return found
