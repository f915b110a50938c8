"""The kinds of tasks, and how a data set is read as one of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from datasets import Dataset, Features, Image

from fish_tuning.experiments.config.sections import DatasetConfig, TaskKind
from fish_tuning.experiments.data.splits import load_splits
from fish_tuning.experiments.data.tasks.base import Task, choose_metric, first_present
from fish_tuning.experiments.data.tasks.causal_lm import CausalLM, has_completions
from fish_tuning.experiments.data.tasks.classification import ImageClassification, TextClassification
from fish_tuning.experiments.data.tasks.labels import LABEL_COLUMNS
from fish_tuning.experiments.data.tasks.token_classification import TokenClassification, has_tagged_tokens

__all__ = ["Encoded", "Task", "encode", "load_task"]

_KINDS: dict[TaskKind, type[Task]] = {
    kind.kind: kind for kind in (TextClassification, ImageClassification, TokenClassification, CausalLM)
}


def load_task(config: DatasetConfig) -> Task:
    """Load the data set and find out what it is. Raises ConfigurationError with the key to set when that fails."""
    splits = load_splits(config)
    kind = config.task or _kind_of(config, splits.all[splits.train].features)
    task = _KINDS[kind].read(config, splits)
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


def _kind_of(config: DatasetConfig, features: Features) -> TaskKind:
    if config.prompt_column or config.completion_column:
        return "causal_lm"
    if config.image_column or "pixel_values" in features or any(isinstance(f, Image) for f in features.values()):
        return "image_classification"
    if has_tagged_tokens(config, features):
        return "token_classification"
    if not config.label_column and not first_present(LABEL_COLUMNS, features) and has_completions(features):
        return "causal_lm"
    return "text_classification"


def _part(split: Dataset, most: int | None) -> Dataset:
    """At most so many rows: the same ones whatever the training seed, so that seeds differ in the training alone."""
    return split.shuffle(seed=0).select(range(most)) if most is not None and most < len(split) else split
