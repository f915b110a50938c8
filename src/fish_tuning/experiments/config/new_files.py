"""Files that are written for the user to go on with: never over one that is there."""

from __future__ import annotations

from pathlib import Path

from fish_tuning.errors import ConfigurationError
from fish_tuning.files.atomic import DISK_FULL, write_atomically


def write_new(path: Path, text: str, way_out: str, *, force: bool = False) -> Path:
    """Write a text to a new file; `force` replaces an old one. Returns the path.

    Raises:
        ConfigurationError: the file is there already (with `way_out` at its end), or cannot be written.
    """
    try:
        if force:
            return write_atomically(path, text.encode())
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
        return path
    except FileExistsError as error:
        raise _there_already(path, way_out) from error
    except OSError as error:
        if error.errno in DISK_FULL:
            path.unlink(missing_ok=True)
            raise
        raise ConfigurationError(f"cannot write {path}: {error.strerror}.") from error


def refuse_old(path: Path, way_out: str) -> None:
    """Raise ConfigurationError, as `write_new` would, where something is in the file's place."""
    if path.exists():
        raise _there_already(path, way_out)


def _there_already(path: Path, way_out: str) -> ConfigurationError:
    return ConfigurationError(f"{path} is there already, and is not overwritten. {way_out}")
