"""The kinds of tasks, and how a data set is read as one of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from datasets import Dataset, Features

from fish_tuning.experiments.config.sections import DatasetConfig
from fish_tuning.experiments.config.task_kinds import TASKS
from fish_tuning.experiments.data.splits import load_splits
from fish_tuning.experiments.data.tasks.base import Task, choose_metric
from fish_tuning.experiments.data.tasks.causal_lm import CausalLM
from fish_tuning.experiments.data.tasks.classification import ImageClassification, TextClassification
from fish_tuning.experiments.data.tasks.token_classification import TokenClassification

__all__ = [
    "CausalLM",
    "Encoded",
    "ImageClassification",
    "Task",
    "TextClassification",
    "TokenClassification",
    "encode",
    "load_task",
    "register_task",
]

T = TypeVar("T", bound=type[Task])


def register_task(kind: T) -> T:
    """Decorator: a kind of task of your own, which `dataset.task` names by its `kind`.

    Where a file does not name a kind, the first that `fits` is taken; the kind registered last is asked first.

    Example:
        >>> from fish_tuning.experiments.data.tasks import TextClassification, register_task
        >>> @register_task
        ... class Toxicity(TextClassification):
        ...     kind = "toxicity"
        ...     def compute_metrics(self, prediction):
        ...         return super().compute_metrics(prediction) | {"f1": 1.0}
    """
    TASKS.register(kind.kind)(kind)
    return kind


for _kind in (TextClassification, CausalLM, TokenClassification, ImageClassification):  # asked from the last
    register_task(_kind)


def load_task(config: DatasetConfig) -> Task:
    """Load the data set and find out what it is. Raises ConfigurationError with the key to set when that fails."""
    splits = load_splits(config)
    kind = TASKS[config.task] if config.task else _kind_of(config, splits.all[splits.train].features)
    task = kind.read(config, splits)
    task = replace(
        task,
        metric=choose_metric(task, config.metric),
        train=_part(task.train, config.max_train_samples),
        validation=_part(task.validation, config.max_validation_samples),
        more_validation={n: _part(split, config.max_validation_samples) for n, split in task.more_validation.items()},
    )
    task.check_labels()
    return task


class Encoded(NamedTuple):
    """A task's splits as its collator takes them."""

    train: Dataset
    validation: Dataset
    more_validation: dict[str, Dataset]


def encode(task: Task, processing_class: Any, max_length: int) -> Encoded:
    """The task's splits, cut to `max_length` tokens."""
    train, validation = (
        task.usable(name, task.encode(split, processing_class, max_length))
        for name, split in ((task.train_split, task.train), (task.validation_split, task.validation))
    )
    more = {name: task.encode(split, processing_class, max_length) for name, split in task.more_validation.items()}
    return Encoded(train, validation, more)


def _kind_of(config: DatasetConfig, features: Features) -> type[Task]:
    fitting = (kind for kind in reversed(list(TASKS.values())) if kind.fits(config, features))
    return next(fitting, TextClassification)


def _part(split: Dataset, most: int | None) -> Dataset:
    """At most so many rows: the same ones whatever the training seed, so that seeds differ in the training alone."""
    return split.shuffle(seed=0).select(range(most)) if most is not None and most < len(split) else split
