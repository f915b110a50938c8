"""Deltas on disk: one sealed safetensors file with positions and values of the entries that were trained."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fish_tuning.errors import MaskError
from fish_tuning.files.sealed import check_names, is_shape, read_sealed, write_sealed

DELTA_FILE_NAME = "delta.safetensors"  # as experiments call it, beside a mask
_DIGEST = re.compile(r"([a-z0-9_]+:[0-9a-f]{64})?")


@dataclass(frozen=True)
class DeltaTensor:
    """The trained entries of one tensor: `values` at the ascending positions `index` of the flattened tensor.

    `digest` is that of the entries before training. A tensor that was trained as a whole has neither index nor digest:
    nothing of the base is left in it.
    """

    values: Tensor
    index: Tensor | None
    shape: torch.Size
    digest: str | None

    def entries(self, tensor: Tensor) -> Tensor:
        """The entries of `tensor` that are this delta's."""
        tensor = tensor.detach()
        return tensor if self.index is None else tensor.take(self.index.to(tensor.device, torch.long))

    def write(self, tensor: Tensor, entries: Tensor) -> None:
        with torch.no_grad():
            if self.index is None:
                tensor.copy_(entries)
            else:
                tensor.put_(self.index.to(tensor.device, torch.long), entries.to(tensor))


@dataclass(frozen=True, repr=False)
class Delta:
    """A delta in memory, from `load_delta`: the trained entries of each tensor by its name in the model."""

    tensors: Mapping[str, DeltaTensor]

    @property
    def num_parameters(self) -> int:
        """Number of entries that it holds."""
        return sum(tensor.values.numel() for tensor in self.tensors.values())

    def __repr__(self) -> str:
        return f"Delta({self.num_parameters:,} parameters of {len(self.tensors)} tensors)"


def write_delta(delta: Delta, path: str | os.PathLike[str]) -> None:
    """Write a delta to the file `path`, whole or not at all; the same delta always gives the same bytes."""
    tensors = {f"values:{name}": tensor.values for name, tensor in delta.tensors.items()}
    tensors |= {f"index:{name}": tensor.index for name, tensor in delta.tensors.items() if tensor.index is not None}
    described = {
        name: {"shape": list(tensor.shape), "dtype": dtype_name(tensor.values.dtype), "digest": tensor.digest}
        for name, tensor in delta.tensors.items()
    }
    write_sealed(path, "delta", described, tensors)


def load_delta(path: str | os.PathLike[str]) -> Delta:
    """Read a delta that `save_delta` wrote. Raises MaskError when the file is missing, something else, or damaged.

    Example:
        >>> import tempfile, torch
        >>> from fish_tuning import apply_mask, load_delta, save_delta
        >>> model = torch.nn.Linear(4, 3, bias=False)
        >>> apply_mask(model, {"weight": torch.eye(3, 4, dtype=torch.bool)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_delta(model, f"{folder}/delta.safetensors")
        ...     delta = load_delta(f"{folder}/delta.safetensors")
        >>> delta.num_parameters, delta.tensors["weight"].index.tolist()
        (3, [0, 5, 10])
    """
    described, tensors = read_sealed(path, "delta")
    shown = os.fspath(path)
    for name, entry in described.items():
        if not _is_description(entry):
            raise MaskError(f"{shown!r} is damaged: its header does not describe {name!r} as a tensor of a delta.")
    masked = [name for name, entry in described.items() if entry["digest"] is not None]
    check_names(shown, [*(f"values:{name}" for name in described), *(f"index:{name}" for name in masked)], tensors)
    delta = Delta(
        {
            name: DeltaTensor(
                values=tensors[f"values:{name}"],
                index=tensors.get(f"index:{name}"),
                shape=torch.Size(entry["shape"]),
                digest=entry["digest"],
            )
            for name, entry in described.items()
        }
    )
    for name, tensor in delta.tensors.items():
        if fault := _fault(tensor, described[name]["dtype"]):
            raise MaskError(f"{shown!r} is damaged: {name!r} {fault}.")
    return delta


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_description(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"shape", "dtype", "digest"} or not is_shape(entry["shape"]):
        return False
    digest = entry["digest"]
    return digest is None or (isinstance(digest, str) and _DIGEST.fullmatch(digest) is not None)


def _fault(tensor: DeltaTensor, dtype: str) -> str | None:
    """What is wrong with a tensor, to be read after its name; None when it is sound."""
    values, index, size = tensor.values, tensor.index, tensor.shape.numel()
    if dtype_name(values.dtype) != dtype:
        return f"has values of {dtype_name(values.dtype)}, and its header says {dtype}"
    if index is None:
        fits = values.shape == tensor.shape
        return None if fits else f"has values of the shape {tuple(values.shape)}, not {tuple(tensor.shape)}"
    if index.dtype not in (torch.int32, torch.int64):
        return f"has positions of {dtype_name(index.dtype)}"
    if index.dim() != 1 or values.shape != index.shape or not len(index):
        return f"has positions of the shape {tuple(index.shape)} and values of the shape {tuple(values.shape)}"
    if not (index.diff() > 0).all():
        return "has positions that do not ascend"
    if index[0] < 0 or index[-1] >= size:
        return f"has positions outside of its {size:,} entries"
    return None
