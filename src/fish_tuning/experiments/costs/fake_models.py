"""Models whose tensors have shapes and dtypes and no memory, but behave as if they were on a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fish_tuning.sparse.groups import small_groups
from fish_tuning.sparse.selected_gradients import whole_tensors

VALUES = "_values"  # after a masked tensor's name: the parameter that trains in its place


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors on the CPU in the place of all tensors of a model, in place; tied ones stay tied."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                made[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                made[id(tensor)] = nn.Parameter(made[id(tensor)], requires_grad=tensor.requires_grad)
        return made[id(tensor)]

    for module in model.modules():
        for place in (module._parameters, module._buffers, vars(module)):
            for name, tensor in list(place.items()):
                if isinstance(tensor, Tensor):
                    place[name] = fake(tensor)  # type: ignore[assignment]


def mask_fake(model: nn.Module, kept: Mapping[str, int], gpu: bool = False) -> list[Tensor]:
    """Have a fake model train so many entries of each of these tensors, as a mask does; which ones costs no difference.

    Returns the tensors that hold the frozen entries and the positions; the values are parameters of the model.

    Args:
        gpu: whether small tensors go together as they do on a GPU.
    """
    beside: list[Tensor] = []
    for group in groups_of(model, kept, gpu):
        members = [(name, *_owner(model, name), model.get_parameter(name)) for name in group]
        if not kept[group[0]]:
            members[0][3].requires_grad_(False)
            continue
        beside += [tensor.detach() for *_, tensor in members]
        beside += _train_entries(members, kept)
    return beside


def groups_of(model: nn.Module, kept: Mapping[str, int], gpu: bool = False) -> list[list[str]]:
    """The names of the masked tensors that go together."""
    names = list(kept)
    tensors = [model.get_parameter(name) for name in names]
    keys = [(t.dtype, t.dim() > 1) if kept[name] else None for name, t in zip(names, tensors, strict=True)]
    return [[names[place] for place in group] for group in small_groups([t.numel() for t in tensors], keys, gpu)]


def _train_entries(members: list[Any], kept: Mapping[str, int]) -> list[Tensor]:
    """Of the tensors of one group; returns their positions."""
    counts = [kept[name] for name, *_ in members]
    tensors = [tensor.detach() for *_, tensor in members]
    of_each = counts if len(members) == 1 else [sum(counts)]
    indices = [tensors[0].new_empty(count, dtype=torch.int32) for count in of_each]
    values = [
        nn.Parameter(tensor.new_empty((count,) if tensor.dim() == 1 else (count, 1)))
        for count, tensor in zip(counts, tensors, strict=True)
    ]
    whole = whole_tensors(indices if len(members) == 1 else indices[0], tensors, values)
    for (_, module, local, _), own, tensor in zip(members, values, whole, strict=True):
        del module._parameters[local]
        vars(module)[local] = tensor
        module.register_parameter(local + VALUES, own)
    return indices


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, local = name.rpartition(".")
    return model.get_submodule(path), local
