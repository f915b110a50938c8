"""Which of a Trainer's checkpoints can be resumed from: those that are whole, and were trained with the same mask.

A Trainer writes a checkpoint file by file and `trainer_state.json` last; the mask, of a masked model, comes first. So a
checkpoint is whole when that last file can be read and none of the others was cut, as a power cut may leave them.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME

from fish_tuning.errors import FishTuningWarning, MaskError
from fish_tuning.files.mask_file import MASK_FILE_NAME, load_mask
from fish_tuning.sparse.masked_tensors import get_mask, is_masked

_NAME = re.compile(r"checkpoint-(\d+)")
_METADATA = ".metadata"  # of torch.distributed.checkpoint


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest whole checkpoint in `output_dir`; None where there is none.

    `FishTuningTrainer.train(resume_from_checkpoint=True)` uses it. Any other Trainer takes the newest folder by its
    name, and fails on one that a kill left half-written; give it `resume_from_checkpoint=last_checkpoint(output_dir)`.

    Warns:
        FishTuningWarning: newer checkpoints are not whole and were passed over.

    Example:
        >>> from fish_tuning import last_checkpoint
        >>> last_checkpoint("output-of-no-training")
    """
    faults: list[str] = []
    for folder in checkpoint_folders(Path(output_dir)):
        fault = find_fault(folder)
        if fault is None:
            _warn(faults, f"{str(folder)!r} is resumed from")
            return str(folder)
        faults.append(fault)
    _warn(faults, "none is whole, so there is nothing to resume from")
    return None


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """The checkpoints' folders in `output_dir`, whole or not, the newest first."""
    if not output_dir.is_dir():
        return []
    steps = {path: _NAME.fullmatch(path.name) for path in output_dir.iterdir() if path.is_dir()}
    return sorted((path for path, step in steps.items() if step), key=lambda path: -int(path.name.rpartition("-")[2]))


def find_fault(folder: Path) -> str | None:
    """What keeps a checkpoint from being whole; None when it is."""
    if not folder.is_dir():
        return f"there is no folder {str(folder)!r}"
    state = folder / TRAINER_STATE_NAME
    if not state.is_file():
        return f"{str(folder)!r} has no {TRAINER_STATE_NAME}, which is written last: it is half-written"
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MASK_FILE_NAME and not _is_whole(path):
            return f"{str(path)!r} is damaged or half-written"
    return None


def check_mask(folder: Path, model: nn.Module) -> None:
    """Raise MaskError when the checkpoint in `folder` was not trained with the mask that `model` has."""
    paths = sorted([*folder.glob(MASK_FILE_NAME), *folder.glob(f"*/{MASK_FILE_NAME}")])  # adapters have subfolders
    if not paths:
        if not is_masked(model):
            return
        raise MaskError(
            f"The checkpoint {str(folder)!r} has no {MASK_FILE_NAME}: it was trained without a mask, so its optimizer "
            "holds other tensors than this model trains. Start a new training from its weights."
        )
    saved: dict[str, Tensor] = {}
    for path in paths:
        try:
            saved |= load_mask(path)
        except MaskError as error:
            raise MaskError(f"The checkpoint {str(folder)!r} cannot be resumed from: {error}") from error
    if not same_selection(saved, get_mask(model)):
        raise MaskError(
            f"The checkpoint {str(folder)!r} was trained with another mask than the one given. Use "
            f"load_mask({str(paths[0])!r}) to go on with its own."
        )


def same_selection(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two masks train the same entries. What a mask does not name trains as a whole."""
    for name in one.keys() | other.keys():
        if name in one and name in other:
            if not torch.equal(one[name].cpu(), other[name].cpu()):
                return False
        elif not (one[name] if name in one else other[name]).all():
            return False
    return True


def _is_whole(path: Path) -> bool:
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # compares the sizes that it names with the file's
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):
            return zipfile.is_zipfile(path)  # the directory of a zip file is at its end
        elif path.suffix == ".distcp":
            return (path.parent / _METADATA).is_file()  # which is written last
        elif path.name == _METADATA:
            return _has_all_shards(path.parent)
    except (ValueError, RecursionError, SafetensorError, EOFError, pickle.UnpicklingError):
        return False
    return True


def _has_all_shards(folder: Path) -> bool:
    """Whether the files of a sharded checkpoint (FSDP2) are as long as its metadata say."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    ends: dict[str, int] = {}
    for part in (FileSystemReader(folder).read_metadata().storage_data or {}).values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    return all((folder / name).is_file() and (folder / name).stat().st_size >= end for name, end in ends.items())


def _warn(faults: list[str], then: str) -> None:
    if faults:
        warnings.warn(f"Checkpoints are passed over: {'; '.join(faults)}. Now {then}.", FishTuningWarning, stacklevel=3)
