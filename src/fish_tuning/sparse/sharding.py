"""What engines that spread a model over devices make of its parameters: FSDP (both versions) and DeepSpeed's ZeRO."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

FSDP2, FSDP1 = "FSDP2 (fully_shard)", "FSDP1 (FullyShardedDataParallel)"
ZERO3, ZERO12 = "DeepSpeed ZeRO-3", "DeepSpeed ZeRO-1 or ZeRO-2"
_names_alone = ContextVar("names_alone", default=False)
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# How each gives the whole state dict, on all processes at once, which save_pretrained then takes.
_WHOLE_STATE_DICT = {
    FSDP2: "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)) of "
    "torch.distributed.checkpoint.state_dict",
    FSDP1: "the FSDP model's state_dict() with StateDictType.FULL_STATE_DICT",
    ZERO3: "engine._zero3_consolidated_16bit_state_dict()",
}


@contextmanager
def names_alone() -> Iterator[None]:
    """State dicts give of split tensors no more than name and shape: one process alone can ask for them.

    PEFT's saving takes the names of a head's tensors from its module, where it has been given all tensors.
    """
    token = _names_alone.set(True)
    try:
        yield
    finally:
        _names_alone.reset(token)


def only_names() -> bool:
    """Whether one process alone asks for a state dict, by `names_alone`."""
    return _names_alone.get()


def engine_of(parameter: Tensor) -> str | None:
    """The engine that has taken a parameter; None where none has. DDP leaves no trace on it."""
    if is_sharded(parameter):
        return FSDP2
    own = vars(parameter)  # where engines leave their marks; `getattr` would take its time to find nothing
    if own.get("_fsdp_flattened", False):
        return FSDP1
    if "ds_id" in own:
        return ZERO3
    return ZERO12 if "_hp_mapping" in own else None


def training_engine_of(model: nn.Module) -> str | None:
    """The engine that has taken what trains of a model; None where none has."""
    return next((engine for p in model.parameters() if p.requires_grad and (engine := engine_of(p))), None)


def splitting_engine_of(model: nn.Module, though_gathered: bool = True) -> str | None:
    """The engine that leaves each process a part of what trains; None where none does.

    Without `though_gathered`, None as well where ZeRO-3 has brought all of it here for the moment.
    """
    for parameter in model.parameters():
        engine = engine_of(parameter) if parameter.requires_grad else None
        here = engine == ZERO3 and parameter.numel() == full_shape(parameter).numel()
        if engine not in (None, ZERO12) and (though_gathered or not here):
            return engine
    return None


def whole_state_dict_of(engine: str) -> str:
    """In words, where an engine's users get the state dict of a whole model from."""
    return _WHOLE_STATE_DICT[engine]


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, of which each device has a part."""
    return hasattr(type(tensor), "full_tensor")


def whole(tensor: Any) -> Tensor:
    """The whole of a DTensor, on every process, all of which must ask for it; any other tensor as it is."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return gathered


def local_part(tensor: Any) -> Tensor:
    """This process's part of a DTensor; any other tensor as it is."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def shard_like(tensor: Tensor, other: Any) -> Tensor:
    """This process's part of a tensor that all processes have, spread as the DTensor `other` is."""
    from torch.distributed.tensor import distribute_tensor

    # Each process has it already. torch 2.6, which does not know of that, sends the first one's part to the others.
    known = "src_data_rank" in inspect.signature(distribute_tensor).parameters
    here: dict[str, Any] = {"src_data_rank": None} if known else {}
    tensor = tensor if other.is_meta else tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements, **here)


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter whose memory ZeRO-3 may have given up."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def plain_name(name: str) -> str:
    """A parameter's name without the wrappers that FSDP1 and activation checkpointing put into the model."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
