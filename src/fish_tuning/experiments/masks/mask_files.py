"""The files that hold a mask: a mask's own, a sparse delta, a sparse adapter, an adapter's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fish_tuning.errors import MaskError, did_you_mean_beside
from fish_tuning.files.atomic import recover_folder
from fish_tuning.files.delta_file import DELTA_FILE_NAME, load_delta
from fish_tuning.files.mask_file import MASK_FILE_NAME, load_mask
from fish_tuning.files.sealed import kind_of
from fish_tuning.files.sparse_adapter_file import load_sparse_adapter

ADAPTER_FILE = "adapter_model.safetensors"  # PEFT's name; importing PEFT for it would take seconds
HEAD = ".modules_to_save."


@dataclass(frozen=True)
class Inspected:
    """A mask as it was found: bool tensors by name; `dense` names those that train whole, outside the selection."""

    path: Path
    tensors: dict[str, Tensor]
    dense: frozenset[str]
    note: str = ""

    @property
    def masked(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if name not in self.dense}


def read_mask(path: str) -> Inspected:
    """The mask at `path`: a mask file, a sparse delta, a sparse adapter, or a folder with a mask or a PEFT adapter.

    Raises MaskError, which names the file, when there is nothing of the kind or it is damaged.
    """
    try:
        return _read(Path(path))
    except OSError as error:
        raise MaskError(f"{error.filename or path!r} cannot be read: {error.strerror}.") from error


def _read(file: Path) -> Inspected:
    recover_folder(file)
    if file.is_dir():
        found = [file / name for name in (MASK_FILE_NAME, DELTA_FILE_NAME) if (file / name).is_file()]
        if not found:
            return _without_mask(file)
        file = found[0]
    elif not file.exists():
        raise MaskError(f"There is no file or folder at {str(file)!r}.{did_you_mean_beside(file)}")
    kind = kind_of(file)
    if kind is None:
        raise MaskError(
            f"{str(file)!r} holds weights, but is neither a mask, a sparse delta nor a sparse adapter of fish-tuning. "
            f"For an adapter, give the folder that {ADAPTER_FILE} and {MASK_FILE_NAME} lie in."
        )
    tensors = _READERS[kind](file)
    if not tensors:
        raise MaskError(f"{str(file)!r} holds no tensors.")
    note = "A delta leaves out tensors without a kept entry: shares are of those it has." if kind == "delta" else ""
    return Inspected(
        file, tensors, frozenset(name for name, tensor in tensors.items() if _is_dense(name, tensor)), note
    )


_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "mask": load_mask,
    "delta": lambda file: _selected(file),
    "sparse adapter": lambda file: load_sparse_adapter(file).mask(),
}


def _is_dense(name: str, tensor: Tensor) -> bool:
    # A wholly kept tensor of a PEFT method was selected as a whole; any other, a head or a bias, was excluded.
    return bool(tensor.all()) and (HEAD in name or not name.startswith("base_model."))


def _selected(file: Path) -> dict[str, Tensor]:
    """The mask that a sparse delta was trained with."""
    delta = load_delta(file)
    needed = sum(tensor.shape.numel() for tensor in delta.tensors.values())
    # A delta names the shapes of its tensors and holds few of their entries.
    if needed > (free := psutil.virtual_memory().available):
        raise MaskError(f"{str(file)!r} is of tensors with {needed:,} entries, too many for {free:,} bytes of memory.")
    selected = {}
    for name, tensor in delta.tensors.items():
        flat = torch.full((tensor.shape.numel(),), tensor.index is None)
        if tensor.index is not None:
            flat[tensor.index.long()] = True
        selected[name] = flat.reshape(tensor.shape)
    return selected


def _without_mask(folder: Path) -> Inspected:
    file = folder / ADAPTER_FILE
    if not file.is_file():
        below = sorted(found for depth in ("*", "*/*") for found in folder.glob(f"{depth}/{MASK_FILE_NAME}"))
        hint = f" Folders below have masks, e.g. {str(below[0].parent)!r}." if below else ""
        raise MaskError(f"The folder {str(folder)!r} has neither {MASK_FILE_NAME} nor {ADAPTER_FILE}.{hint}")
    try:
        with safe_open(file, framework="pt") as content:
            shapes = {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise MaskError(f"{str(file)!r} is not a readable safetensors file: {error}") from error
    heads = _heads(folder / "adapter_config.json")
    tensors = {_full_name(name, heads): torch.tensor(True).expand(shape) for name, shape in shapes.items()}
    return Inspected(file, tensors, frozenset(tensors), f"No {MASK_FILE_NAME} lies beside it: nothing is masked.")


def _heads(config: Path) -> list[str]:
    if not config.is_file():
        return []
    try:
        content = json.loads(config.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MaskError(f"{str(config)!r} is not readable JSON: {error}") from error
    heads = content.get("modules_to_save") if isinstance(content, dict) else content
    if heads is None:
        return []
    if not isinstance(heads, list) or not all(isinstance(head, str) for head in heads):
        raise MaskError(f"{str(config)!r} is no adapter's configuration: modules_to_save is not a list of names.")
    return heads


def _full_name(name: str, heads: Sequence[str]) -> str:
    """PEFT leaves out of a file's names which of them are heads; the configuration beside it tells."""
    return next((name.replace(f".{head}.", f".{head}{HEAD}") for head in heads if f".{head}." in name), name)


def short_names(paths: Sequence[Path]) -> list[str]:
    """The ends of the paths that tell them apart: the folder's name for a mask in an adapter folder."""
    parts = [(path.parent if path.name == MASK_FILE_NAME else path).resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts))):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names
