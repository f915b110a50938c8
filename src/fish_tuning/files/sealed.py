"""Sealed safetensors files: a description, its tensors and a checksum over both. The form of masks, deltas and sparse
adapters.

All metadata is one JSON text under one key, because the safetensors writer has no fixed order of keys: the same content
gives the same bytes. The checksum covers the description and each tensor's name, dtype, shape and bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fish_tuning.errors import FishTuningWarning, MaskError, did_you_mean_beside
from fish_tuning.files.atomic import write_atomically

_KEY = "fish_tuning"
_VERSION = "v2"
_KINDS = ("mask", "delta", "sparse adapter")
# Version 1 had a `format` and no checksum; the description of its tensors lay under a key of its own.
_V1_DESCRIPTION = {"mask": "shapes", "delta": "tensors"}


class Sealed(NamedTuple):
    """What a sealed file holds: a description by name, and the stored tensors."""

    described: dict[str, Any]
    tensors: dict[str, Tensor]


class _Header(NamedTuple):
    kind: str
    version: str
    described: Any
    checksum: str | None


def write_sealed(
    path: str | os.PathLike[str], kind: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a file of this kind, whole or not at all. Raises MaskError when there is no folder to write it to."""
    path = Path(path)
    if path.is_dir():
        raise MaskError(f"{str(path)!r} is a folder; give the name of the {kind} file to write.")
    if not path.parent.is_dir():
        raise MaskError(f"There is no folder {str(path.parent)!r} to write the {kind} file {path.name!r} to.")
    described = dict(sorted(described.items()))
    metadata = sealed_metadata(kind, described, _checksum(f"{_KEY}.{kind}.{_VERSION}", described, tensors))
    write_atomically(path, safetensors.torch.save(dict(tensors), metadata=metadata))


def sealed_metadata(kind: str, described: Mapping[str, Any], checksum: str) -> dict[str, str]:
    """What the header of a file of this kind holds beside its tensors."""
    header = {"format": f"{_KEY}.{kind}.{_VERSION}", "sha256": checksum, "tensors": dict(described)}
    return {_KEY: json.dumps(header)}


def read_sealed(path: str | os.PathLike[str], kind: str) -> Sealed:
    """Read a file of this kind. Raises MaskError when it is missing, something else, or not as it was written."""
    shown = repr(os.fspath(path))
    if not Path(path).is_file():
        found = " It is a folder." if Path(path).is_dir() else did_you_mean_beside(path)
        raise MaskError(f"There is no {kind} file at {shown}.{found}")
    header, tensors = _read(Path(path), kind)
    if not isinstance(header.described, dict):
        raise MaskError(f"{shown} is damaged: its header does not describe its tensors.")
    if header.version == "v1":
        warnings.warn(
            f"{shown} was written by an earlier version, without a checksum: not all damage to it could be seen. Load "
            "and save it to give it one.", FishTuningWarning, stacklevel=3,
        )  # fmt: skip
    elif header.checksum != _checksum(f"{_KEY}.{kind}.{header.version}", header.described, tensors):
        raise MaskError(f"{shown} is damaged: its content is not what its checksum (sha256) was made of.")
    return Sealed(header.described, tensors)


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """ "mask", "delta" or "sparse adapter", or None for a safetensors file of others.

    Raises MaskError when it is no such file.
    """
    shown = repr(os.fspath(path))
    if not Path(path).is_file():
        raise MaskError(f"There is no file at {shown}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(file.metadata() or {}, shown)
    except (SafetensorError, OSError) as error:
        raise MaskError(f"{shown} is not a readable safetensors file: {error}") from error
    return header and header.kind


def check_names(path: str, described: Collection[str], found: Collection[str]) -> None:
    """Raise MaskError unless the tensors found are those that the header describes."""
    if lost := sorted(set(described) - set(found)):
        raise MaskError(f"{path!r} is damaged: the tensor {lost[0]!r} that its header describes is missing.")
    if more := sorted(set(found) - set(described)):
        raise MaskError(f"{path!r} is damaged: its header does not describe the tensor {more[0]!r}.")


def is_shape(value: object) -> bool:
    """Whether a header's `value` can be the shape of a tensor, whatever it claims."""
    if not isinstance(value, list) or len(value) > 64 or any(type(size) is not int or size < 0 for size in value):
        return False
    entries = 1
    for size in value:
        entries *= max(size, 1)
    return entries < 2**63


def _read(path: Path, kind: str) -> tuple[_Header, dict[str, Tensor]]:
    shown = repr(os.fspath(path))
    try:
        # No tensor can be larger than the file: the library checks the sizes that the header claims against it.
        with safe_open(path, framework="pt") as file:
            header = _header(file.metadata() or {}, shown)
            if header is None or header.kind != kind:
                found = f"a {header.kind}" if header else "nothing of fish-tuning's"
                raise MaskError(f"{shown} is a safetensors file, but not a {kind}: it holds {found}.")
            if header.version not in ("v1", _VERSION):
                raise MaskError(
                    f"{shown} has the format {header.version}; this version of fish-tuning reads v1 and {_VERSION}. "
                    "Install the version that wrote it, or a newer one."
                )
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise MaskError(f"{shown} is not a readable safetensors file: {error}") from error


def _header(metadata: Mapping[str, str], shown: str) -> _Header | None:
    """None: the file is not of this package."""
    if _KEY in metadata:
        header = _parsed(metadata[_KEY], shown)
        if not isinstance(header, dict) or header.keys() != {"format", "sha256", "tensors"}:
            raise MaskError(f"{shown} is damaged: its header is not one of fish-tuning.")
        form, described, checksum = header["format"], header["tensors"], header["sha256"]
    else:
        form, described, checksum = metadata.get("format"), None, None
    parts = form.split(".") if isinstance(form, str) else []
    if len(parts) != 3 or parts[0] != _KEY or parts[1] not in _KINDS:
        return None
    _, kind, version = parts
    if _KEY not in metadata:
        described = _parsed(metadata.get(_V1_DESCRIPTION.get(kind, ""), ""), shown)
    return _Header(kind, version, described, checksum)


def _parsed(text: str, shown: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MaskError(f"{shown} is damaged: its header is not readable JSON ({error}).") from error


def _checksum(form: str, described: Any, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(_line([form, described]))
    for name, tensor in sorted(tensors.items()):
        digest.update(_line([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _line(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"
