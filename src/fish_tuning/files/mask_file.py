"""Masks on disk: one sealed safetensors file, one bit an entry."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fish_tuning.errors import MaskError
from fish_tuning.files.sealed import Sealed, check_names, is_shape, read_sealed, write_sealed

MASK_FILE_NAME = "fish_mask.safetensors"


def save_mask(mask: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write `mask` ({name: bool tensor}) to the file `path`, eight entries a byte, with a checksum.

    The file is written whole or not at all, and the same mask always gives the same bytes.

    Raises MaskError when a tensor is not bool, or when there is no folder to write the file to.

    Example:
        >>> import tempfile, torch
        >>> from fish_tuning import load_mask, save_mask
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_mask({"weight": torch.tensor([True, False])}, f"{folder}/mask.safetensors")
        ...     load_mask(f"{folder}/mask.safetensors")
        {'weight': tensor([ True, False])}
    """
    for name, selected in mask.items():
        if selected.dtype != torch.bool:
            raise MaskError(f"The mask of {name!r} is {selected.dtype}; a mask holds torch.bool.")
    shapes = {name: list(selected.shape) for name, selected in mask.items()}
    write_sealed(path, "mask", shapes, {name: _pack(selected) for name, selected in mask.items()})


def load_mask(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a mask that `save_mask` wrote; `path` is its file, or the folder of an adapter or a checkpoint with one.

    Raises MaskError when the file is missing, is something else, or is not as it was written.
    """
    path = _file_in(path)
    shapes, packed = sealed = read_sealed(path, "mask")
    _check(os.fspath(path), sealed)
    return {name: _unpack(packed[name], shape).to(device) for name, shape in shapes.items()}


def _file_in(path: str | os.PathLike[str]) -> str:
    """The mask's file, where a folder is given."""
    folder = Path(path)
    if not folder.is_dir() or (folder / MASK_FILE_NAME).is_file():
        return os.fspath(folder / MASK_FILE_NAME if folder.is_dir() else path)
    below = sorted(str(found.parent) for depth in ("*", "*/*") for found in folder.glob(f"{depth}/{MASK_FILE_NAME}"))
    hint = (
        f" Folders below have one; give one of {', '.join(map(repr, below[:5]))}{', ...' if len(below) > 5 else ''}."
        if below
        else " An adapter that was trained without a mask has none; get_mask and save_mask write one."
    )
    raise MaskError(f"The folder {os.fspath(path)!r} has no {MASK_FILE_NAME}.{hint}")


def _pack(selected: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(selected.cpu().reshape(-1).numpy()))


def _unpack(packed: Tensor, shape: list[int]) -> Tensor:
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape)).astype(bool)
    return torch.from_numpy(bits).reshape(shape)


def _check(path: str, sealed: Sealed) -> None:
    """Whether each tensor is just what its shape asks for; before anything of that shape is made."""
    shapes, packed = sealed
    check_names(path, shapes, packed)
    for name, shape in shapes.items():
        if not is_shape(shape):
            raise MaskError(f"{path!r} is damaged: its header gives {name!r} no possible shape.")
        bits, tensor = math.prod(shape), packed[name]
        if tensor.dtype != torch.uint8 or tensor.shape != ((bits + 7) // 8,):
            raise MaskError(
                f"{path!r} is damaged: {name!r} of the shape {tuple(shape)} takes {(bits + 7) // 8:,} bytes, and the "
                f"file has {tensor.dtype} of the shape {tuple(tensor.shape)}."
            )
        if bits % 8 and int(tensor[-1]) & (0xFF >> bits % 8):
            raise MaskError(f"{path!r} is damaged: there are bits behind the last entry of {name!r}.")
