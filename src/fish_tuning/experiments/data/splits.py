"""From a data set's name, folder or files to its splits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from datasets.utils import logging as datasets_logging

from fish_tuning.errors import ConfigurationError, did_you_mean
from fish_tuning.experiments.config.neighbours import refuse_missing
from fish_tuning.experiments.config.sections import DatasetConfig
from fish_tuning.experiments.data.builtin import resolve_builtin

TRAIN_SPLITS = ("train",)
HELD_OUT_SPLIT = "held out of training"
VALIDATION_SPLITS = ("validation", "validation_matched", "dev", "val", "test")
# datasets' builder and its options for each kind of file.
# In tables an empty cell alone is empty: "NA" and "None" are texts, and names of classes.
_CELLS: tuple[tuple[str, Any], ...] = (("keep_default_na", False), ("na_values", ("",)))
FILE_FORMATS: dict[str, tuple[str, tuple[tuple[str, Any], ...]]] = {
    ".csv": ("csv", _CELLS),
    ".tsv": ("csv", (("sep", "\t"), *_CELLS)),
    ".json": ("json", ()),
    ".jsonl": ("json", ()),
    ".parquet": ("parquet", ()),
}


class Splits(NamedTuple):
    """All splits, and the names of the one to train on and the one to measure on."""

    all: DatasetDict
    train: str
    validation: str


def load_splits(config: DatasetConfig) -> Splits:
    """Load the data, and find the split to train on and the one to measure on.

    Where `dataset.validation_split` is a share, that much of the training split is held out, the same for every seed.
    Raises ConfigurationError with the key to set when the data cannot be loaded or a split is missing or empty.
    """
    splits = load_all(config)
    train = find("dataset.train_split", config.train_split, TRAIN_SPLITS, list(splits), "split")
    if isinstance(config.validation_split, float):
        splits = _hold_out(splits, train, config.validation_split)
        validation = HELD_OUT_SPLIT
    else:
        usual = [name for name in VALIDATION_SPLITS if name != train]
        if config.validation_split is None and not set(usual) & set(splits):
            raise ConfigurationError(
                f"dataset.validation_split: none of the usual names ({', '.join(usual)}) is among the splits found: "
                f"{', '.join(splits)}. Name one, or write a share such as 0.1 to hold out that much of {train!r}."
            )
        validation = find("dataset.validation_split", config.validation_split, usual, list(splits), "split")
    for split in (train, validation):
        if not len(splits[split]):
            raise ConfigurationError(f"The split {split!r} of {config.task_name} is empty.")
    return Splits(splits, train, validation)


def _hold_out(splits: DatasetDict, train: str, share: float) -> DatasetDict:
    rows = len(splits[train])
    if not 0 < round(share * rows) < rows:
        raise ConfigurationError(
            f"dataset.validation_split={share}: of the {rows} rows of {train!r} that leaves none to measure or to "
            "train on."
        )
    parts = splits[train].train_test_split(test_size=round(share * rows), seed=0)
    return DatasetDict({**splits, train: parts["train"], HELD_OUT_SPLIT: parts["test"]})


def find(key: str, asked: str | None, usual: Sequence[str], found: Sequence[str], what: str) -> str:
    if asked is not None:
        if asked in found:
            return asked
        raise ConfigurationError(
            f"{key}: there is no {what} {asked!r}; found: {', '.join(found)}.{did_you_mean(asked, found)}"
        )
    for name in usual:
        if name in found:
            return name
    raise ConfigurationError(
        f"{key}: none of the usual names ({', '.join(usual)}) is among the {what}s found: {', '.join(found)}."
        f" Set {key}."
    )


def load_all(config: DatasetConfig) -> DatasetDict:
    """Every split of the data. Raises ConfigurationError when it cannot be loaded."""
    load_args = config.load_args
    if config.data_files:
        return _load_files(config.data_files)
    args = [resolve_builtin(argument) for argument in load_args]
    named = " ".join(load_args)
    if args[0].startswith((".", "/", "~")):
        args[0] = os.path.expanduser(args[0])
        if not Path(args[0]).exists():
            raise ConfigurationError(f"dataset.load_args: there is no folder {load_args[0]!r} (from {os.getcwd()!r}).")
    needed = "a folder of csv, json or parquet files is needed, named after its splits, such as train.csv and dev.csv."
    if Path(args[0]).is_file():
        raise ConfigurationError(f"dataset.load_args: {load_args[0]!r} is a file; {needed}")
    try:
        with _datasets_quiet():
            more = {"revision": config.revision} if config.revision else {}
            splits = load_dataset(*args, **more, **_options_of(Path(args[0])))
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError) and error.filename is not None:  # such as datasets' cache
            raise ConfigurationError(
                f"dataset.load_args: {named!r} cannot be loaded: {str(error.filename)!r}: {error.strerror}."
            ) from error
        if Path(args[0]).is_dir():
            raise ConfigurationError(
                f"dataset.load_args: no data was found in the folder {named!r}; {needed}"
            ) from error
        raise ConfigurationError(
            f"dataset.load_args: {named!r} is neither a folder here nor a data set that the hub gave: {error}"
        ) from error
    except (DatasetsError, ValueError, TypeError, RuntimeError, OSError) as error:
        raise ConfigurationError(f"dataset.load_args: {named!r} cannot be loaded: {_reason(error)}") from error
    if not isinstance(splits, DatasetDict):
        raise ConfigurationError(f"dataset.load_args: {named!r} names one split; name the data set, splits are found.")
    return splits


def _options_of(folder: Path) -> dict[str, Any]:
    """Of a folder of tables and of nothing else that is data, how their cells are read."""
    found = {FILE_FORMATS[end][0] for path in folder.rglob("*") if (end := path.suffix.lower()) in FILE_FORMATS}
    return dict(_CELLS) if found == {"csv"} else {}


def _load_files(files: Mapping[str, str]) -> DatasetDict:
    """Splits from single files, all of one format."""
    paths = {split: os.path.expanduser(path) for split, path in files.items()}
    refuse_missing(paths.values())
    formats = {FILE_FORMATS.get(Path(path).suffix.lower()) for path in paths.values()}
    if len(formats) != 1 or None in formats:
        raise ConfigurationError(
            f"dataset.data_files: {', '.join(paths.values())} must be of one format, which the name's end tells: "
            f"{', '.join(FILE_FORMATS)}."
        )
    ((builder, options),) = formats  # type: ignore[misc]
    try:
        with _datasets_quiet():
            return load_dataset(builder, data_files=paths, **dict(options))
    except (DatasetsError, ValueError, TypeError, RuntimeError, OSError) as error:
        raise ConfigurationError(
            f"dataset.data_files: {', '.join(paths.values())} cannot be read: {_reason(error)}"
        ) from error


@contextmanager
def _datasets_quiet() -> Iterator[None]:
    """Without its log, which tells of a damaged file what its error tells."""
    before = datasets_logging.get_verbosity()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(before)


def _reason(error: Exception) -> str:
    """What is wrong in a file: told by the cause; the error itself says only that something is."""
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError):
        return (
            f"it is not in UTF-8 (byte {cause.object[cause.start]:#04x} at {cause.start}). Save it in UTF-8: "
            "iconv -f latin1 -t utf-8."
        )
    reason = str(cause).strip()
    if "No columns to parse" in reason:
        return "it is empty."
    if "corresponds to no data" in reason:
        return "it has no rows."
    return reason
