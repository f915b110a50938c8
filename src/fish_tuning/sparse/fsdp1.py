"""FSDP1 (`FullyShardedDataParallel`): its wrappers in a model, and masks in place of what they have flattened."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn

from fish_tuning.errors import FishTuningError
from fish_tuning.model_walks import every_module
from fish_tuning.sparse.sharding import FSDP1, plain_name


def wrappers_of(model: nn.Module) -> list[Any]:
    """Its wrappers in a model, outer ones first."""
    return [module for module in every_module(model) if is_wrapper(module)]


def is_wrapper(module: nn.Module) -> bool:
    """By name, since FSDP1 is not loaded where nobody uses it."""
    return type(module).__name__ == "FullyShardedDataParallel"


def fsdp1_parameters(model: nn.Module) -> dict[int, tuple[Any, torch.Size]]:
    """The wrapper and the whole shape of each tensor that is flattened (`use_orig_params`), by the tensor's id.

    Nothing where wrappers outside of this model count on what is inside.
    """
    found: dict[int, tuple[Any, torch.Size]] = {}
    wrappers = wrappers_of(model)
    if wrappers and wrappers[0]._is_root is False:
        return found
    for wrapper in wrappers:
        flat = wrapper._handle and wrapper._handle.flat_param
        for parameter, shape in (
            zip(flat._params, flat._shapes, strict=True) if flat is not None and flat._params else ()
        ):
            found[id(parameter)] = wrapper, shape
    return found


def check_idle(wrapper: Any, doing: str, kind: type[FishTuningError]) -> None:
    """An error of this kind within a pass or a `summon_full_params`, and where a step's gradients are not reduced."""
    if wrapper.training_state.name != "IDLE":
        raise kind(
            f"{FSDP1} is within a pass or a summon_full_params, and cannot gather the model for another. {doing} "
            "outside."
        )
    handle = wrapper._handle
    if handle is not None and handle.uses_sharded_strategy and _holds_whole_gradients(handle.flat_param):
        name = plain_name(handle.flat_param._fqns[0])
        raise kind(
            f"{name!r} and what FSDP1 keeps with it hold gradients that it has not reduced (no_sync). {doing} before "
            "or after the accumulation of a step, not within."
        )


def _holds_whole_gradients(flat: Any) -> bool:
    return flat.grad is not None and flat.grad.numel() > flat._local_shard.numel()


@contextmanager
def flattened_again(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Of these tensors, those that FSDP1 has are whole until this is left; what is then in their places is flattened.

    A wrapper that has one of them flattens the others anew, so at most one wrapper's tensors are whole beside these.
    All processes must enter this.
    """
    named: dict[int, tuple[str, nn.Module, str]] = {}
    for prefix, module in model.named_modules():
        for local, each in module._parameters.items():
            if each is not None:
                named.setdefault(id(each), (plain_name(f"{prefix}.{local}" if prefix else local), module, local))
    places: dict[Any, list[tuple[nn.Module, str]]] = {}
    for parameter, (wrapper, _) in fsdp1_parameters(model).items():
        name, module, local = named[parameter]
        if name in names:
            places.setdefault(wrapper, []).append((module, local))
    wrappers = wrappers_of(model)
    for wrapper, taken in places.items():
        _note_anew(wrappers)
        _flatten(wrapper, without={id(module._parameters[local]) for module, local in taken})
    yield
    for wrapper, taken in places.items():
        _note_anew(wrappers)
        _flatten(wrapper, and_also={id(module._parameters.get(local)) for module, local in taken})
    if places:
        _note_anew(wrappers)


def _note_anew(wrappers: list[Any]) -> None:
    """Before the next pass, the root notes again which wrappers there are and what they have."""
    for wrapper in wrappers:
        wrapper._reset_lazy_init()


def _flatten(wrapper: Any, without: Collection[int] = (), and_also: Collection[int] = ()) -> None:
    """The wrapper flattens what it has, but for these tensors, and these others of its module, anew."""
    own: list[Any] = []
    if wrapper._handle is not None:
        with type(wrapper).summon_full_params(wrapper, recurse=False, writeback=False):
            own = list(wrapper._handle.flat_param._params)
            dense = [parameter.detach().clone() for parameter in own]
        for parameter, whole in zip(own, dense, strict=True):
            parameter.data, parameter.grad, parameter._fsdp_flattened = whole, None, False
        wrapper._fully_sharded_module_to_handle.clear()
        wrapper.params.clear()
        wrapper._handle = None
    chosen = {id(parameter) for parameter in own} - set(without) | set(and_also)
    module = wrapper._fsdp_wrapped_module
    flat = [parameter for parameter in module.parameters() if id(parameter) in chosen]
    import_module("torch.distributed.fsdp._init_utils")._init_param_handle_from_params(wrapper, flat, module)
