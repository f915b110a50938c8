"""DeepSpeed's ZeRO: the objects behind its hooks, and tensors that an engine has left behind."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from importlib import import_module
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.model_walks import every_module, every_parameter
from fish_tuning.sparse.sharding import ZERO3, ZERO12, engine_of, plain_name

# Of each module, what ZeRO-3's hooks do before and after its backward pass: an engine takes those that are there.
_BACKWARD = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "ds_grads_remaining")


def is_split(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has split it."""
    return engine_of(parameter) == ZERO3


def is_together(parameter: Any) -> bool:
    """Whether ZeRO-3 has brought together what it has split."""
    return bool(parameter.ds_status.name == "AVAILABLE")


def gather(parameters: list[Any]) -> None:
    """Bring together what ZeRO-3 has split, on every process."""
    if parameters:
        parameters[0].all_gather_coalesced(parameters).wait()


@torch.no_grad()
def whole_copy(parameter: Any) -> Tensor:
    """The whole of a parameter that ZeRO-3 has split, on every process; it stays as it is."""
    together = is_together(parameter)
    gather([] if together else [parameter])
    copy: Tensor = parameter.detach().clone()
    if not together:
        parameter.partition()
    return copy


def behind(module: nn.Module) -> Any:
    """The object whose hooks gather what ZeRO-3 has split for a module; None where there is none."""
    return _behind(module._forward_pre_hooks.values())


def _behind(hooks: Iterable[Any]) -> Any:
    for hook in hooks:
        cells = [cell.cell_contents for cell in getattr(hook, "__closure__", None) or ()]
        for value in cells:
            if isinstance(value, deepspeed_hooks().DeepSpeedZeRoOffload):
                return value
        if (found := _behind(value for value in cells if isinstance(value, FunctionType))) is not None:  # decorated
            return found
    return None


def deepspeed_hooks() -> Any:
    """Where ZeRO-3's hooks are; loaded, since a tensor is split."""
    return import_module("deepspeed.runtime.zero.parameter_offload")


def left_by_engines(model: nn.Module) -> dict[int, nn.Parameter]:
    """The tensors that ZeRO has had or split, by their ids, where no engine has the model (none yet, or no more)."""
    marked = [parameter for parameter in every_parameter(model) if engine_of(parameter) in (ZERO3, ZERO12)]
    live = any(map(_is_held, marked)) or (
        any(map(is_split, marked)) and any(behind(module) is not None for module in every_module(model))
    )
    return {} if live else {id(parameter): parameter for parameter in marked}


def _is_held(parameter: Any) -> bool:
    """Whether ZeRO's optimizer waits for a parameter's gradient, or has its master weight in this process."""
    hooks: dict[int, Any] = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    waits = any(str(getattr(hook, "__module__", None)).startswith("deepspeed.") for hook in hooks.values())
    return waits or getattr(parameter, "_hp_mapping", None) is not None


def take_back(model: nn.Module, names: Collection[str]) -> None:
    """Of these tensors, those that engines have left behind become ordinary ones, whole on every process.

    All processes must do so. The next engine takes what is then in their places.
    """
    left = left_by_engines(model)
    if not left:
        return
    taken: set[int] = set()
    for prefix, module in model.named_modules():
        for local, parameter in module._parameters.items():
            name = plain_name(f"{prefix}.{local}" if prefix else local)
            if parameter is not None and id(parameter) in left and name in names:
                dense = whole_copy(parameter) if is_split(parameter) else parameter.detach().clone()
                module._parameters[local] = nn.Parameter(dense, requires_grad=parameter.requires_grad)
                taken.add(id(parameter))
    for module in model.modules():
        forget_engine(module, taken)


def forget_engine(module: nn.Module, taken: Collection[int] = ()) -> None:
    """What a destroyed engine leaves in a module, of which the next would take some for its own."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number, hook in list(hooks.items()):
            if getattr(hook, "__module__", None) == "deepspeed.runtime.engine":
                del hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
    own: dict[str, Any] = vars(module)
    for name in _BACKWARD:
        own.pop(name, None)
    external = own.get("_external_params", {})
    for key, parameter in list(external.items()):
        if id(parameter) in taken:
            del external[key]  # else it would be gathered for this module
