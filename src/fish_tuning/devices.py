"""What not every device can do."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_FLOAT64 = {"mps"}  # Apple's GPUs


def has_float64(device: torch.device) -> bool:
    return device.type not in WITHOUT_FLOAT64


def multiplies_bf16(device: torch.device) -> bool:
    """Whether products in bfloat16 take no more time than in fp32. A CPU without instructions for it imitates it."""
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type != "cpu" or (known is not None and bool(known()))


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where its device has none."""
    return tensor.double() if has_float64(tensor.device) else tensor.cpu().double()


def moved(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """`tensor.to(device, dtype)`, by way of the device where the tensor's own does not have the dtype."""
    if dtype == torch.float64 and not has_float64(tensor.device):
        return tensor.to(device).to(dtype)
    return tensor.to(device, dtype)
