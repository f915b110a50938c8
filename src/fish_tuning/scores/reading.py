"""Tensors that are read on the CPU, and those that go to a device from there: with as few waits as can be.

A read waits until a GPU has done all that it was given, and meanwhile gives it nothing more to do.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Where a copy from ordinary memory may be left to itself: CUDA takes what it copies aside before it goes on.
_WITHOUT_WAITING = {"cuda"}


def read(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors on the CPU, with one wait for all of a device and a dtype."""
    given = [tensor.detach() for tensor in tensors]
    together: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, tensor in enumerate(given):
        if tensor.device.type != "cpu":
            together.setdefault((tensor.device, tensor.dtype), []).append(number)
    for numbers in together.values():
        parts = torch.cat([given[number].reshape(-1) for number in numbers]).cpu()
        for number, part in zip(numbers, parts.split([given[number].numel() for number in numbers]), strict=True):
            given[number] = part.view(given[number].shape)
    return given


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. Nobody may write into it afterwards where it came from."""
    return tensor.to(device, non_blocking=device.type in _WITHOUT_WAITING)
