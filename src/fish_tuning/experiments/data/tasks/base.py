"""What every kind of task has: its splits, and all that the runner needs to know of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from datasets import Dataset, Features, Value
from transformers import Trainer

from fish_tuning.errors import ConfigurationError, did_you_mean
from fish_tuning.experiments.config.sections import DatasetConfig
from fish_tuning.experiments.data.metrics import Metrics, usual_metric
from fish_tuning.experiments.data.splits import Splits

TEXT_TYPES = ("string", "large_string")


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A data set that a model can be trained on. `labels` is the class names, or None where there are no classes.

    A kind of task is a subclass: how its columns are found (`read`), encoded and batched, which model it needs, and how
    it is measured.
    """

    kind: ClassVar[str]
    auto_class: ClassVar[str]  # of transformers
    brings_head: ClassVar[bool] = True  # a new one, which trains as a whole
    processor: ClassVar[Literal["tokenizer", "image_processor"]] = "tokenizer"  # makes a row a model's inputs
    training_arguments: ClassVar[Mapping[str, Any]] = {}  # that this kind cannot do without
    # Whether the model's loss is a mean over the tokens of all processes. Of other losses, which are means over a
    # process's examples, the Trainer would train and report as many times the loss as there are processes.
    average_tokens_across_devices: ClassVar[bool] = False

    name: str
    train: Dataset
    validation: Dataset
    train_split: str
    validation_split: str
    columns: tuple[str, ...]  # the inputs; empty: the data carries the model's inputs
    labels: tuple[str, ...] | None = None
    metric: str = ""  # what arms are compared by
    more_validation: dict[str, Dataset] = field(default_factory=dict)  # further sets, by what tells them apart

    @classmethod
    def fits(cls, config: DatasetConfig, features: Features) -> bool:
        """Whether a data set with these columns is of this kind, where `dataset.task` does not say."""
        return False

    @classmethod
    @abstractmethod
    def read(cls, config: DatasetConfig, splits: Splits) -> Task:
        """The task, with its columns found and checked. Raises ConfigurationError with the key to set."""

    @classmethod
    def _made(cls, config: DatasetConfig, splits: Splits, train: Dataset, validation: Dataset, **others: Any) -> Task:
        """The task of what was found."""
        return cls(
            name=config.task_name,
            train=train,
            validation=validation,
            train_split=splits.train,
            validation_split=splits.validation,
            **others,
        )

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics that fit, the usual one first."""

    @abstractmethod
    def encode(self, split: Dataset, processing_class: Any, max_length: int) -> Dataset:
        """A split with what the collator takes, and nothing else."""

    @abstractmethod
    def collator(self, processing_class: Any) -> Any:
        """From a list of encoded rows to a batch."""

    def compute_metrics(self, prediction: Any) -> Metrics:
        """All metrics of a Trainer's prediction."""
        raise TypeError(f"{type(self).__name__} is not measured by its Trainer's predictions.")

    def constant_value(self, train: Dataset, validation: Dataset) -> float | None:
        """The metric of always predicting the commonest class of the encoded `train`, or the mean; None: no such thing.

        What an arm has to be better than before it has learned anything of the inputs.
        """
        return None

    @property
    def encodes(self) -> bool:
        """Whether rows need the model's tokenizer or image processor."""
        return bool(self.columns)

    def check_labels(self) -> None:  # noqa: B027  # not every kind has labels
        """Raise ConfigurationError where the rows that are used cannot be learned from, or measured on."""

    def check(self, processing_class: Any, model_config: Any, max_length: int) -> list[str]:
        """Raise ConfigurationError for what would only fail once training is prepared; returns notes for the user."""
        return []

    def usable(self, split: str, encoded: Dataset) -> Dataset:
        """The encoded rows that can be used; ConfigurationError where a row must not be left out."""
        return encoded

    def configure(self, model_config: Any) -> None:
        """Set what the task decides in the model's configuration."""
        if self.labels:
            model_config.id2label = dict(enumerate(self.labels))
            model_config.label2id = {label: number for number, label in enumerate(self.labels)}

    def make_trainer(self, *, processing_class: Any, **arguments: Any) -> Trainer:
        """The Trainer of one run."""
        return Trainer(
            data_collator=self.collator(processing_class),
            processing_class=processing_class,
            compute_metrics=self.compute_metrics,
            **arguments,
        )

    @property
    def num_labels(self) -> int | None:
        """How many classes, 1 for a number, None where the task is neither."""
        return len(self.labels) if self.labels else 1

    @property
    def used_columns(self) -> tuple[str, ...]:
        """The columns that are read, but for labels."""
        return self.columns

    @property
    def tokens_written(self) -> int:
        """How many tokens a model may write after a prompt when it is measured; 0 where it writes none."""
        return 0

    def longest_prompt(self, encoded: Dataset) -> int:
        """Tokens of the longest text that the model writes after; 0 where it writes none."""
        return 0


def choose_metric(task: Task, asked: str | None) -> str:
    """The metric to compare by: the one asked for, if it fits, else the usual one."""
    if asked is None:
        return usual_metric(task.name, task.metrics)
    if asked in task.metrics:
        return asked
    raise ConfigurationError(
        f"dataset.metric={asked!r} does not fit {task.name}, which is {task.kind.replace('_', ' ')}"
        f"{f' with {task.num_labels} classes' if task.labels else ''}; what fits is {', '.join(task.metrics)}."
        f"{did_you_mean(asked, task.metrics)}"
    )


def is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in TEXT_TYPES


def check_filled(split: str, data: Dataset, columns: Mapping[str, str]) -> None:
    """Refuse a split that lacks one of the columns, or has a row without a value there; `columns`: their keys."""
    for column, key in columns.items():
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


def asks_for_completions(config: DatasetConfig) -> bool:
    return bool(config.prompt_column or config.completion_column)


def first_present(names: Sequence[str], features: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in features), None)
