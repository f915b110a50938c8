"""For a file that is not there: what in its folder is called nearly like it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from pathlib import Path

from fish_tuning.errors import ConfigurationError

DATA_FILES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")  # what files of a data set end with
MOST_LOOKED_AT = 1000  # files of one folder


def nearest_file(path: Path, suffixes: Collection[str], names: Iterable[str] = ()) -> str:
    """` Did you mean 'digits.yaml'?` with the nearest file of the folder or the nearest of `names`, or nothing.

    Args:
        path: what was asked for.
        suffixes: what files end with, in small letters.
        names: that would have done as well, such as those of shipped experiments.
    """
    here = {file.name: str(path.parent / file.name) for file in _files(path.parent, suffixes)}
    here |= {Path(name).stem: written for name, written in here.items() if Path(name).stem not in here}
    known = {**here, **{name: name for name in names if name not in here}}
    lower = {name.lower(): written for name, written in reversed(known.items())}
    for asked in dict.fromkeys((path.name.lower(), path.stem.lower())):
        if near := difflib.get_close_matches(asked, list(lower), n=1):
            return f" Did you mean {lower[near[0]]!r}?"
    return ""


def refuse_missing(files: Iterable[str]) -> None:
    """Data files must be there; needs no library, so that a mistyped name is told at once."""
    missing = [file for file in files if not Path(file).expanduser().is_file()]
    if missing:
        if Path(missing[0]).expanduser().is_dir():
            raise ConfigurationError(
                f"dataset.data_files: {missing[0]!r} is a folder. Name files, or give the folder to dataset.load_args."
            )
        hint = nearest_file(Path(missing[0]).expanduser(), DATA_FILES)
        raise ConfigurationError(
            f"dataset.data_files: there is no file {missing[0]!r} (from {str(Path.cwd())!r}).{hint}"
        )


def _files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    try:
        found = sorted(file for file, _ in zip(folder.iterdir(), range(MOST_LOOKED_AT), strict=False))
        return [file for file in found if file.suffix.lower() in suffixes and file.suffix and file.is_file()]
    except OSError:
        return []
