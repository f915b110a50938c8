"""The errors that fish-tuning raises on purpose. All of them derive from `FishTuningError`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class FishTuningError(Exception):
    """Root of every error that fish-tuning raises on purpose; its text is meant for the user."""


class ConfigurationError(FishTuningError):
    """A configuration, argument or combination of the two that cannot work (exit code 2)."""


class FisherError(FishTuningError):
    """The Fisher information cannot be computed as asked for."""


class MaskError(FishTuningError):
    """A mask cannot be made, stored or applied as asked for."""


class RecordError(FishTuningError):
    """A file that tells of a run cannot be believed: it is cut off, damaged or something else."""


class ZeroScoresError(MaskError):
    """More entries are asked for than have a non-zero score, and the caller made that an error."""


class FishTuningWarning(UserWarning):
    """Something that still works, but hardly as the user expects."""


def did_you_mean(wrong: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` with the nearest of `allowed`, or nothing when none is near."""
    near = difflib.get_close_matches(wrong, list(allowed), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def did_you_mean_beside(path: str | os.PathLike[str]) -> str:
    """`did_you_mean` for a file or folder that is not there, of those that lie where it should."""
    wanted = Path(path)
    try:
        return did_you_mean(wanted.name, (name for name in os.listdir(wanted.parent) if name != wanted.name))
    except (OSError, ValueError):  # no folder either, or nothing that can be a path
        return ""


class ProcessesLost(FishTuningError):
    """Processes cannot go on together: one has ended, or has failed alone while others wait for it."""


def out_of_memory(error: Exception) -> bool:
    """torch.OutOfMemoryError of a GPU, or the plain RuntimeError of the CPU's allocator and of other devices."""
    return "memory" in f"{type(error).__name__} {error}".lower()


class OthersOutOfMemory(FisherError):
    """Another process has run out of memory while this one scored its share."""


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an error of scoring is one of memory, in this process or in another."""
    if isinstance(error, FishTuningError):  # some of which speak of memory
        return isinstance(error, OthersOutOfMemory)
    return out_of_memory(error)
