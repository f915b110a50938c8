"""Sizes of files that have not been written: exact, from the names, dtypes and shapes of what would be in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fish_tuning.files.delta_file import dtype_name
from fish_tuning.files.sealed import sealed_metadata

_DIGEST = "0" * 64
# How safetensors calls dtypes, in the order of its own enumeration: the largest is written first.
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}


class Described(NamedTuple):
    """A tensor as files describe it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def safetensors_size(tensors: Mapping[str, Described], metadata: Mapping[str, str] | None = None) -> int:
    """Bytes of a safetensors file of these tensors.

    Example:
        >>> import torch
        >>> from safetensors.torch import save
        >>> from fish_tuning.files.sizes import Described, safetensors_size
        >>> written = save({"a": torch.zeros(2, 3)}, metadata={"format": "pt"})
        >>> len(written) == safetensors_size({"a": Described(torch.float32, (2, 3))}, {"format": "pt"})
        True
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-_ORDER[item[1].dtype], item[0])):
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + math.ceil(length / 8) * 8 + end


def mask_size(shapes: Mapping[str, Sequence[int]]) -> int:
    """Bytes of the file that `save_mask` writes of a mask with these shapes: one bit an entry, and the header."""
    packed = {name: Described(torch.uint8, (math.ceil(math.prod(shape) / 8),)) for name, shape in shapes.items()}
    described = {name: list(shape) for name, shape in shapes.items()}
    return safetensors_size(packed, sealed_metadata("mask", described, _DIGEST))


def delta_size(tensors: Mapping[str, Described], kept: Mapping[str, int]) -> int:
    """Bytes of the file that `save_delta` writes, where `kept` tells how many entries of the masked tensors train."""
    stored, described = {}, {}
    for name, (dtype, shape) in tensors.items():
        entries = (kept[name],) if name in kept else shape
        digest = f"{dtype_name(dtype)}:{_DIGEST}" if name in kept else None
        stored[f"values:{name}"] = Described(dtype, entries)
        if name in kept:
            stored[f"index:{name}"] = Described(torch.int32 if math.prod(shape) < 2**31 else torch.int64, entries)
        described[name] = {"shape": list(shape), "dtype": dtype_name(dtype), "digest": digest}
    return safetensors_size(stored, sealed_metadata("delta", described, _DIGEST))
