"""The model itself, without what parallel training, compilation and mixed precision have put around it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import MethodType
from typing import Any

import torch
from accelerate.utils.operations import ConvertOutputsToFp32  # type: ignore[import-untyped]
from torch import nn

from fish_tuning.model_walks import every_module

_AUTOCAST_CODE = torch.autocast("cpu")(lambda: None).__code__  # that of every function under an autocast decorator


def unwrapped(model: nn.Module) -> nn.Module:
    """The module within DDP, DataParallel, `torch.compile` and a DeepSpeed engine."""
    while True:
        kinds = {cls.__name__ for cls in type(model).__mro__}
        if "OptimizedModule" in kinds:
            inner = model._orig_mod
        elif kinds & {"DistributedDataParallel", "DataParallel", "DeepSpeedEngine"}:
            inner = model.module
        else:
            return model
        model = inner  # type: ignore[assignment]


def without_mixed_precision(model: nn.Module, stack: ExitStack) -> None:
    """Take accelerate's autocast off every module's `forward` until the stack closes.

    `Accelerator.prepare`, which every Trainer with bf16 or fp16 calls, leaves it there: its casts would be scored.
    """
    for module in every_module(model):
        forward = vars(module).get("forward")
        if forward is not None and (bare := _bare(forward)) is not forward:
            _set_own(module, bare, stack)


def uncompiled(stack: ExitStack) -> None:
    """Run what `torch.compile` has compiled as it is written: hooks see nothing of a compiled layer."""
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import takes seconds
        stack.enter_context(torch.compiler.set_stance("force_eager"))


def _bare(forward: Callable[..., Any]) -> Callable[..., Any]:
    """What accelerate has wrapped, once or several times: an autocast, and a cast of the outputs around it."""
    function = getattr(forward, "__func__", forward)
    cast = getattr(function, "__wrapped__", None)
    if not isinstance(cast, ConvertOutputsToFp32):
        return forward
    inner = cast.model_forward
    if getattr(inner, "__code__", None) is _AUTOCAST_CODE:
        inner = inner.__wrapped__
    return _bare(MethodType(inner, forward.__self__) if isinstance(forward, MethodType) else inner)


def _set_own(module: nn.Module, forward: Callable[..., Any], stack: ExitStack) -> None:
    own = vars(module)
    before = own["forward"]
    stack.callback(own.__setitem__, "forward", before)
    if getattr(forward, "__func__", None) is type(module).forward:
        del own["forward"]
    else:
        own["forward"] = forward
