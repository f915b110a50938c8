"""Masks on disk: one safetensors file, one bit an entry."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fish_tuning.errors import MaskError

_FORMAT = "fish_tuning.mask.v1"
MASK_FILE_NAME = "fish_mask.safetensors"


def save_mask(mask: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write `mask` ({name: bool tensor}) to the file `path`, eight entries a byte.

    Example:
        >>> import tempfile, torch
        >>> from fish_tuning import load_mask, save_mask
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_mask({"weight": torch.tensor([True, False])}, f"{folder}/mask.safetensors")
        ...     load_mask(f"{folder}/mask.safetensors")
        {'weight': tensor([ True, False])}
    """
    packed = {name: torch.from_numpy(np.packbits(tensor.cpu().numpy().reshape(-1))) for name, tensor in mask.items()}
    shapes = json.dumps({name: list(tensor.shape) for name, tensor in mask.items()})
    save_file(packed, path, metadata={"format": _FORMAT, "shapes": shapes})


def load_mask(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a mask that `save_mask` wrote. Raises MaskError when the file is missing or is something else."""
    if not Path(path).is_file():
        raise MaskError(f"There is no mask file at {os.fspath(path)!r}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise MaskError(f"{os.fspath(path)!r} is a safetensors file, but not a mask ({_FORMAT}).")
            return {
                name: _unpack(file.get_tensor(name), shape).to(device)
                for name, shape in json.loads(metadata["shapes"]).items()
            }
    except SafetensorError as error:
        raise MaskError(f"{os.fspath(path)!r} is not a readable safetensors file: {error}") from error


def _unpack(packed: Tensor, shape: list[int]) -> Tensor:
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape)).astype(bool)
    return torch.from_numpy(bits).reshape(shape)
