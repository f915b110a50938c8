"""From a column of labels to class numbers or floats under the name `labels`, with the class names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Dataset, Value

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.data.tasks.base import is_text

LABEL_COLUMNS = ("label", "labels", "target", "class", "score")


MOST_CLASSES = 10_000  # of numbers: more are amounts, dates or row numbers


def labelled(
    train: Dataset, validation: Dataset, column: str, more: Sequence[Dataset] = ()
) -> tuple[Dataset, Dataset, tuple[str, ...] | None]:
    """Both splits with a `labels` column of class ids or floats, and the class names (None: regression).

    Whole numbers are the ids where they are 0 to the largest without a gap in all splits, `more` included; else they
    are names, so that 1 and 5 are two classes.
    """
    feature = train.features[column]
    if isinstance(feature, Value) and "int" in feature.dtype:
        splits = [split for split in (train, validation, *more) if split.features[column] == feature]
        numbers = sorted({int(number) for split in splits for number in split[column]})
        if numbers and numbers[0] >= 0 and numbers[-1] >= len(numbers):
            _check_number(len(numbers), column)
            named = ClassLabel(names=list(map(str, numbers)))
            train, validation = (
                split.cast_column(column, Value("string")).cast_column(column, named) for split in (train, validation)
            )
    if isinstance(feature, Value) and feature.dtype == "bool":
        truth = ClassLabel(names=["false", "true"])
        train, validation = train.cast_column(column, truth), validation.cast_column(column, truth)
    elif is_text(feature):
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
    return train, validation, class_names(feature, set(train["labels"]), set(validation["labels"]))


def _check_number(classes: int, column: str) -> None:
    if classes > MOST_CLASSES:
        raise ConfigurationError(
            f"dataset.label_column: {column!r} holds {classes:,} different whole numbers, which would be as many "
            f"classes where {MOST_CLASSES:,} are the most. Name the column of the classes; or, to predict the numbers "
            "themselves, store them with a decimal point."
        )


def class_names(feature: Any, train: set[int], validation: set[int]) -> tuple[str, ...]:
    """The class names, once every label of both splits is known to be one."""
    found = train | validation
    if not isinstance(feature, ClassLabel) and max(found) >= MOST_CLASSES:
        raise ConfigurationError(
            f"dataset.label_column: labels run up to {max(found):,}, with a class for each number below it; "
            f"{MOST_CLASSES:,} classes are the most. Number them from 0, or write them as text."
        )
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else tuple(map(str, range(max(found) + 1)))
    if min(found) < 0 or max(found) >= len(names):
        raise ConfigurationError(
            f"dataset.label_column: labels run from {min(found)} to {max(found)}; "
            + (
                "a split whose labels are all -1 is a test split with hidden labels: set dataset.validation_split."
                if {-1} in (train, validation)
                else f"0 to {len(names) - 1} are allowed. Number the classes from 0, or write them as text."
            )
        )
    return names
