"""From a data set's name or folder to tokenised splits: columns, labels and the task are found from the data."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from fish_tuning.errors import ConfigurationError, did_you_mean
from fish_tuning.experiments.builtin import resolve_builtin
from fish_tuning.experiments.sections import DatasetConfig

TRAIN_SPLITS = ("train",)
VALIDATION_SPLITS = ("validation", "validation_matched", "dev", "val", "test")
# MNLI is measured on texts like those of its training set and on others.
MORE_VALIDATION = {"mismatched": "validation_mismatched"}
LABEL_COLUMNS = ("label", "labels", "target", "class", "score")
# datasets' builder and its options for each kind of file.
FILE_FORMATS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    ".csv": ("csv", ()),
    ".tsv": ("csv", (("sep", "\t"),)),
    ".json": ("json", ()),
    ".jsonl": ("json", ()),
    ".parquet": ("parquet", ()),
}
TEXT_TYPES = ("string", "large_string")
# A data set that carries a model's main input is used as it is.
READY_INPUTS: dict[str, Literal["text", "image"]] = {"input_ids": "text", "pixel_values": "image"}


@dataclass(frozen=True)
class Task:
    """A data set ready to be tokenised. `labels` is the class names, or None for regression."""

    name: str
    kind: Literal["text", "image"]
    train: Dataset
    validation: Dataset
    train_split: str
    validation_split: str
    text_columns: tuple[str, ...]  # empty: the data carries the model's inputs
    labels: tuple[str, ...] | None
    more_validation: dict[str, Dataset] = field(default_factory=dict)  # further sets, by what tells them apart

    @property
    def num_labels(self) -> int:
        return len(self.labels) if self.labels else 1


def load_task(config: DatasetConfig) -> Task:
    """Load the data set and find out what it is. Raises ConfigurationError with the key to set when that fails."""
    splits = _load(config)
    train_split = _find("dataset.train_split", config.train_split, TRAIN_SPLITS, list(splits), "split")
    validation_split = _find(
        "dataset.validation_split", config.validation_split, VALIDATION_SPLITS, list(splits), "split"
    )
    train, validation = splits[train_split], splits[validation_split]
    for split, data in ((train_split, train), (validation_split, validation)):
        if not len(data):
            raise ConfigurationError(f"The split {split!r} of {config.task_name} is empty.")
    columns = train.column_names
    label_column = _find("dataset.label_column", config.label_column, LABEL_COLUMNS, columns, "column")
    # Of `label` and `labels` one is the label, and the other would take its place or pass for a text.
    train, validation = (
        split.remove_columns(sorted(({"label", "labels"} - {label_column}) & set(split.column_names)))
        for split in (train, validation)
    )
    text_columns, kind = _inputs(config.text_column, label_column, train.features)
    for name, data in ((train_split, train), (validation_split, validation)):
        _check_filled(name, data, label_column, text_columns)
    more = {} if config.validation_split else {name: splits[s] for name, s in MORE_VALIDATION.items() if s in splits}
    more = {name: _labelled(train, split, label_column)[1] for name, split in more.items()}
    train, validation, labels = _labelled(train, validation, label_column)
    if config.max_train_samples is not None and config.max_train_samples < len(train):
        # The same part whatever the training seed, so that seeds differ in the training alone.
        train = train.shuffle(seed=0).select(range(config.max_train_samples))
    return Task(
        name=config.task_name,
        kind=kind,
        train=train,
        validation=validation,
        train_split=train_split,
        validation_split=validation_split,
        text_columns=text_columns,
        labels=labels,
        more_validation=more,
    )


def tokenize(task: Task, tokenizer: Any, max_length: int) -> tuple[Dataset, Dataset]:
    """The task's training and validation split with the columns that a model takes, and nothing else."""
    train, validation = (tokenize_split(task, split, tokenizer, max_length) for split in (task.train, task.validation))
    return train, validation


def tokenize_split(task: Task, split: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """One of the task's splits, likewise."""
    if not task.text_columns:
        kept = {*READY_INPUTS, "attention_mask", "token_type_ids", "labels"}
        return split.remove_columns(sorted(set(split.column_names) - kept))

    def encode(rows: dict[str, list[Any]]) -> Any:
        return tokenizer(*(rows[column] for column in task.text_columns), truncation=True, max_length=max_length)

    return split.map(encode, batched=True, remove_columns=[c for c in split.column_names if c != "labels"])


def _load(config: DatasetConfig) -> DatasetDict:
    load_args = config.load_args
    if config.data_files:
        return _load_files(config.data_files)
    args = [resolve_builtin(argument) for argument in load_args]
    named = " ".join(load_args)
    if args[0].startswith((".", "/", "~")):
        args[0] = os.path.expanduser(args[0])
        if not Path(args[0]).exists():
            raise ConfigurationError(f"dataset.load_args: there is no folder {load_args[0]!r} (from {os.curdir!r}).")
    needed = "a folder of csv, json or parquet files is needed, named after its splits, such as train.csv and dev.csv."
    if Path(args[0]).is_file():
        raise ConfigurationError(f"dataset.load_args: {load_args[0]!r} is a file; {needed}")
    try:
        splits = load_dataset(*args, **({"revision": config.revision} if config.revision else {}))
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        if Path(args[0]).is_dir():
            raise ConfigurationError(
                f"dataset.load_args: no data was found in the folder {named!r}; {needed}"
            ) from error
        raise ConfigurationError(
            f"dataset.load_args: {named!r} is neither a folder here nor a data set that the hub gave: {error}"
        ) from error
    except (DatasetsError, ValueError, TypeError, RuntimeError, OSError) as error:
        # What is wrong in a file is told by the cause; the error itself says only that something is.
        reason = str(error.__cause__ or error).strip()
        raise ConfigurationError(f"dataset.load_args: {named!r} cannot be loaded: {reason}") from error
    if not isinstance(splits, DatasetDict):
        raise ConfigurationError(f"dataset.load_args: {named!r} names one split; name the data set, splits are found.")
    return splits


def _load_files(files: Mapping[str, str]) -> DatasetDict:
    """Splits from single files, all of one format."""
    paths = {split: os.path.expanduser(path) for split, path in files.items()}
    missing = [path for path in paths.values() if not Path(path).is_file()]
    if missing:
        raise ConfigurationError(f"dataset.data_files: there is no file {missing[0]!r} (from {os.curdir!r}).")
    formats = {FILE_FORMATS.get(Path(path).suffix.lower()) for path in paths.values()}
    if len(formats) != 1 or None in formats:
        raise ConfigurationError(
            f"dataset.data_files: {', '.join(paths.values())} must be of one format, which the name's end tells: "
            f"{', '.join(FILE_FORMATS)}."
        )
    ((builder, options),) = formats  # type: ignore[misc]
    try:
        return load_dataset(builder, data_files=paths, **dict(options))
    except (DatasetsError, ValueError, TypeError, RuntimeError, OSError) as error:
        reason = str(error.__cause__ or error).strip()
        raise ConfigurationError(f"dataset.data_files: {', '.join(paths.values())} cannot be read: {reason}") from error


def _find(key: str, asked: str | None, usual: Sequence[str], found: Sequence[str], what: str) -> str:
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


def _inputs(
    asked: str | list[str] | None, label_column: str, features: Features
) -> tuple[tuple[str, ...], Literal["text", "image"]]:
    if asked is None:
        for column, kind in READY_INPUTS.items():
            if column in features:
                return (), kind
        texts = [name for name, feature in features.items() if name != label_column and _is_text(feature)]
        if len(texts) not in (1, 2):
            raise ConfigurationError(
                f"dataset.text_column: one or two text columns are needed, found {len(texts)} "
                f"({', '.join(texts) or 'none'}) among {', '.join(features)}. Set dataset.text_column."
            )
        return tuple(texts), "text"
    columns = (asked,) if isinstance(asked, str) else tuple(asked)
    for column in columns:
        _find("dataset.text_column", column, (), list(features), "column")
        if column == label_column or not _is_text(features[column]):
            what = "the label column" if column == label_column else f"{features[column]}"
            texts = [name for name, feature in features.items() if name != label_column and _is_text(feature)]
            raise ConfigurationError(
                f"dataset.text_column: {column!r} is {what}; a column of texts is needed, found: "
                f"{', '.join(texts) or 'none'}."
            )
    return columns, "text"


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in TEXT_TYPES


def _check_filled(split: str, data: Dataset, label_column: str, text_columns: Sequence[str]) -> None:
    """Refuse a split that lacks a column, or a label or text in some row."""
    for column in (label_column, *text_columns):
        key = "dataset.label_column" if column == label_column else "dataset.text_column"
        if column not in data.column_names:
            raise ConfigurationError(
                f"{key}: the split {split!r} has no column {column!r}; found: {', '.join(data.column_names)}. "
                "Set dataset.validation_split to a split that has it."
            )
        empty = data.data.column(column).null_count
        if empty == len(data):
            raise ConfigurationError(
                f"{key}: the column {column!r} is empty in the whole split {split!r}. "
                "Set dataset.validation_split or dataset.train_split to a split that has it."
            )
        if empty:
            raise ConfigurationError(
                f"{key}: the column {column!r} is empty (null) in {empty} of the {len(data)} rows of the split "
                f"{split!r}. Fill these rows or take them out."
            )


def _labelled(train: Dataset, validation: Dataset, column: str) -> tuple[Dataset, Dataset, tuple[str, ...] | None]:
    """Both splits with a `labels` column of class ids or floats, and the class names (None: regression)."""
    feature = train.features[column]
    if isinstance(feature, Value) and feature.dtype == "bool":
        truth = ClassLabel(names=["false", "true"])
        train, validation = train.cast_column(column, truth), validation.cast_column(column, truth)
    elif _is_text(feature):
        texts = sorted(set(train[column]))
        cast = ClassLabel(names=texts)
        unknown = set(validation[column]) - set(texts)
        if unknown:
            raise ConfigurationError(
                f"dataset.label_column: the validation split has labels the training split lacks: {sorted(unknown)}."
            )
        train, validation = train.cast_column(column, cast), validation.cast_column(column, cast)
    if column != "labels":
        train, validation = train.rename_column(column, "labels"), validation.rename_column(column, "labels")
    feature = train.features["labels"]
    if isinstance(feature, Value) and feature.dtype.startswith("float"):
        if not all(math.isfinite(label) for split in (train, validation) for label in split["labels"]):
            raise ConfigurationError(f"dataset.label_column: {column!r} holds numbers that are not finite (nan, inf).")
        return train, validation, None
    if not isinstance(feature, ClassLabel) and not (isinstance(feature, Value) and "int" in feature.dtype):
        raise ConfigurationError(f"dataset.label_column: {column!r} is {feature}; classes or numbers are needed.")
    found = set(train["labels"]) | set(validation["labels"])
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else tuple(map(str, range(max(found) + 1)))
    if min(found) < 0 or max(found) >= len(names):
        hidden = any(set(split["labels"]) == {-1} for split in (train, validation))
        raise ConfigurationError(
            f"dataset.label_column: labels run from {min(found)} to {max(found)}; "
            + (
                "a split whose labels are all -1 is a test split with hidden labels: set dataset.validation_split."
                if hidden
                else f"0 to {len(names) - 1} are allowed. Number the classes from 0, or write them as text."
            )
        )
    if len(set(train["labels"])) < 2:
        raise ConfigurationError(f"dataset.label_column: {column!r} has one class only; there is nothing to learn.")
    return train, validation, names
