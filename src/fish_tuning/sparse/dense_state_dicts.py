"""A masked module's state dict: its tensors by their own names, in their own shapes, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from fish_tuning.sparse.frozen_parts import keep_frozen_part
from fish_tuning.sparse.sharding import is_sharded, only_names, shard_like, whole
from fish_tuning.sparse.whole_tensors import MaskedTensor

STATE = "_fish_tuning_masked_tensor_"  # with a tensor's local name: the attribute of its module that has it
GROUP = "_fish_tuning_group_"  # the same, for the group that it is in: modules alone keep groups alive
_CHECKPOINTS = "torch.distributed.checkpoint.state_dict"


def own_memory(tensor: Tensor) -> Tensor:
    """The tensor; a copy where it shares memory with others."""
    return tensor if _is_alone(tensor) else tensor.clone()


def own_storage(tensor: Tensor) -> Tensor:
    """The tensor, in its memory and with its count of changes, but with a storage that ends where it ends.

    Who writes into a state dict writes into the model (averages of weights do). Code that saves tensors takes those of
    one storage for one, and torch.save writes all of it. Where only a copy has such a storage, a copy.
    """
    if _is_alone(tensor):
        return tensor
    if type(tensor) is not Tensor or tensor.device.type not in ("cpu", "cuda") or not tensor.is_contiguous():
        return tensor.clone()
    with torch.inference_mode(False):
        part = from_dlpack(tensor.view(-1).view(torch.uint8))
        tensor.data = part.view(tensor.dtype).view(tensor.shape)
    return tensor


def _is_alone(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


class DenseStateDict:
    """State-dict hook of the owning module: gives the tensor under its own name, in its own shape."""

    def __init__(self, local: str) -> None:
        self.local = local

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        masked: MaskedTensor = vars(module)[STATE + self.local]
        if self.local not in module._parameters:  # PEFT deleted the adapter
            return
        stored = state_dict.get(prefix + self.local)
        own = module._parameters.get(self.local) is masked.values and not masked.group.managed
        if is_sharded(masked.frozen) and only_names():
            state_dict[prefix + self.local] = torch.empty(masked.shape, dtype=masked.frozen.dtype, device="meta")
        elif is_sharded(masked.frozen):
            state_dict[prefix + self.local] = masked.dense_of(stored)
        elif own and masked.group.scattered and masked.values is not None and not masked.values.numel():
            # ZeRO-3's checkpoints hold the values apart. In this shape nobody takes it for the tensor.
            state_dict[prefix + self.local] = masked.unselected()
        elif stored is None or own:
            state_dict[prefix + self.local] = own_storage(masked.read().detach())
        elif is_sharded(stored) and only_names():
            state_dict[prefix + self.local] = torch.empty(masked.shape, dtype=stored.dtype, device="meta")
        elif is_sharded(stored):
            dense = torch.empty(masked.shape, device="meta") if stored.is_meta else masked.dense_of(stored)
            state_dict[prefix + self.local] = shard_like(dense, stored)
        elif stored.numel() == masked.num_selected:
            state_dict[prefix + self.local] = masked.dense_of(stored)


class SplitStateDict:
    """Load hook of the owning module: takes the dense tensor apart into the frozen one and the values."""

    def __init__(self, local: str) -> None:
        self.local = local

    def __call__(
        self,
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: Any,
        missing: Any,
        *_: Any,
    ) -> None:
        masked: MaskedTensor = vars(module)[STATE + self.local]
        name, own = prefix + self.local, module._parameters.get(self.local)
        dense = state_dict.get(name)
        if dense is None and masked.values is None and self.local in module._parameters:
            missing.append(name)  # there is no parameter that torch would miss
        if isinstance(dense, _StandIn):  # nothing has come for it
            state_dict.pop(name)
            if own is not None:
                state_dict[name] = own.detach()
            return
        if not isinstance(dense, Tensor) or self.local not in module._parameters:
            return
        if own is not None and not own.numel() and dense.shape == (masked.shape.numel() - masked.num_selected,):
            masked.put_unselected(dense)  # the values come by ZeRO-3's own ways
            state_dict[name] = own.detach()
        if dense.shape != masked.shape:
            return  # torch says what does not fit
        dense = whole(dense)
        masked.put_dense(dense)
        keep_frozen_part(module, self.local, masked)
        if masked.values is None:
            del state_dict[name]
        else:
            entries = masked.entries_of(dense)
            state_dict[name] = shard_like(entries, own) if is_sharded(own) else entries


class TakeLoaded:
    """Hook after loading: another parameter may stand in the place of the values (`assign=True`)."""

    def __init__(self, local: str) -> None:
        self.local = local

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        masked: MaskedTensor = vars(module)[STATE + self.local]
        values = module._parameters.get(self.local)
        own = values is None or values is masked.values or is_sharded(values)
        if not own and values is not None and values.numel() == masked.num_selected:
            masked.move(lambda tensor: tensor, values)
        masked.group.stale, masked.group.settled = True, False


def put_hooks(module: nn.Module, local: str) -> None:
    """Have the state dicts of a module hold one of its masked tensors as a whole."""
    module.register_state_dict_post_hook(DenseStateDict(local))
    module.register_load_state_dict_pre_hook(SplitStateDict(local))
    module.register_load_state_dict_post_hook(TakeLoaded(local))


def remove_hooks(module: nn.Module, local: str) -> None:
    for kind in ("_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
        hooks = vars(module)[kind]
        for number, hook in list(hooks.items()):
            ours = getattr(hook, "hook", hook)  # which torch wraps with the module that it is of
            if isinstance(ours, DenseStateDict | SplitStateDict | TakeLoaded) and ours.local == local:
                del hooks[number]


class _StandIn:
    """In the place of a masked tensor, where it is to be loaded whole."""


def loads_whole_tensors(frame: FrameType | None) -> bool:
    """Whether it is `set_model_state_dict` that asks for parameters, which fills those of FSDP2 with what is loaded.

    It takes a parameter for a part of the tensor that it loads under its name. In the place of a masked tensor's
    entries it is given what it does not look into, and hands on the whole tensor.
    """
    while frame is not None and frame.f_globals.get("__name__") == _CHECKPOINTS:
        if frame.f_code.co_name == "_load_model_state_dict":
            return True
        frame = frame.f_back
    return False


def with_stand_ins(module: nn.Module, named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """A module's own parameters, and stand-ins for its masked tensors, those too that have no entries."""
    for name, parameter in named:
        if STATE + name not in vars(module):
            yield name, parameter
    for name in module._parameters:
        if STATE + name in vars(module):
            yield name, _StandIn()
