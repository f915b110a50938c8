"""Texts, pairs of texts and images with a class or a number each."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from datasets import Dataset, Features, Image
from transformers import DataCollatorWithPadding, default_data_collator

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.sections import DatasetConfig
from fish_tuning.experiments.data.metrics import (
    BINARY_METRICS,
    CLASS_METRICS,
    REGRESSION_METRICS,
    Metrics,
    class_metrics,
    regression_metrics,
)
from fish_tuning.experiments.data.splits import Splits, find
from fish_tuning.experiments.data.tasks.base import Task, asks_for_completions, check_filled, is_text
from fish_tuning.experiments.data.tasks.labels import LABEL_COLUMNS, labelled

# MNLI is measured on texts like those of its training set and on others.
MORE_VALIDATION = {"mismatched": "validation_mismatched"}


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """One class, or for texts one number, an example."""

    model_inputs: ClassVar[tuple[str, ...]]  # that a data set may carry ready-made

    @classmethod
    @abstractmethod
    def input_columns(cls, config: DatasetConfig, label_column: str, features: Features) -> tuple[str, ...]:
        """The columns of inputs; empty when the data carries the model's inputs."""

    @classmethod
    def read(cls, config: DatasetConfig, splits: Splits) -> Task:
        train, validation = splits.all[splits.train], splits.all[splits.validation]
        label_column = _label_column(config, train)
        # Of `label` and `labels` one is the label, and the other would take its place or pass for a text.
        train, validation = (
            split.remove_columns(sorted(({"label", "labels"} - {label_column}) & set(split.column_names)))
            for split in (train, validation)
        )
        columns = cls.input_columns(config, label_column, train.features)
        needed = {label_column: "dataset.label_column"} | dict.fromkeys(columns, "dataset.text_column")
        for name, data in ((splits.train, train), (splits.validation, validation)):
            check_filled(name, data, needed)
        asked = config.validation_split is not None
        more = {} if asked else {name: splits.all[s] for name, s in MORE_VALIDATION.items() if s in splits.all}
        others = (validation, *more.values())
        more = {name: labelled(train, split, label_column, others)[1] for name, split in more.items()}
        train, validation, labels = labelled(train, validation, label_column, others)
        return cls._made(config, splits, train, validation, columns=columns, labels=labels, more_validation=more)

    @property
    def metrics(self) -> tuple[str, ...]:
        if not self.labels:
            return REGRESSION_METRICS
        return BINARY_METRICS if self.num_labels == 2 else CLASS_METRICS

    def compute_metrics(self, prediction: Any) -> Metrics:
        # Decoder models also return their key-value cache; the logits come first.
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        if not self.labels:
            return regression_metrics(logits, prediction.label_ids)
        return class_metrics(logits.argmax(-1), prediction.label_ids, len(self.labels))

    def constant_value(self, train: Dataset, validation: Dataset) -> float | None:
        if not self.labels:
            return 0.0  # numbers are measured by correlations, and with a constant nothing correlates
        commonest = Counter(train["labels"]).most_common(1)[0][0]
        predicted = [commonest] * len(validation)
        return class_metrics(predicted, validation["labels"], len(self.labels)).get(self.metric)

    def check_labels(self) -> None:
        for split, data, what in (
            (self.train_split, self.train, "learn"),
            (self.validation_split, self.validation, "measure"),
        ):
            if len(set(data["labels"])) < 2:
                raise ConfigurationError(
                    f"dataset.label_column: the {len(data)} rows of the split {split!r} have "
                    f"{'one class' if self.labels else 'one value'} only; there is nothing to {what}. Use another "
                    "split, or more of its rows (dataset.max_train_samples, dataset.max_validation_samples)."
                )

    def configure(self, model_config: Any) -> None:
        super().configure(model_config)
        if not self.labels:
            model_config.num_labels = 1
        model_config.problem_type = "single_label_classification" if self.labels else "regression"

    def _ready(self, split: Dataset) -> Dataset:
        """The model's inputs as the data carries them."""
        return split.select_columns([c for c in split.column_names if c in (*self.model_inputs, "labels")])


@dataclass(frozen=True, kw_only=True)
class TextClassification(Classification):
    """Texts or pairs of texts; a number each is regression."""

    kind: ClassVar[str] = "text_classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    model_inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids")

    @classmethod
    def input_columns(cls, config: DatasetConfig, label_column: str, features: Features) -> tuple[str, ...]:
        texts = [name for name, feature in features.items() if name != label_column and is_text(feature)]
        asked = config.text_column
        if asked is None:
            if "input_ids" in features:
                return ()
            if len(texts) not in (1, 2):
                raise ConfigurationError(
                    f"dataset.text_column: one or two text columns are needed, found {len(texts)} "
                    f"({', '.join(texts) or 'none'}) among {', '.join(features)}. Set dataset.text_column."
                )
            return tuple(texts)
        columns = (asked,) if isinstance(asked, str) else tuple(asked)
        check_texts("dataset.text_column", columns, features, label_column)
        return columns

    def encode(self, split: Dataset, processing_class: Any, max_length: int) -> Dataset:
        if not self.columns:
            return self._ready(split)

        columns = self.columns  # alone, or the map would take the whole task along

        def tokens(rows: Mapping[str, list[Any]]) -> Any:
            return processing_class(*(rows[column] for column in columns), truncation=True, max_length=max_length)

        return split.map(tokens, batched=True, remove_columns=[c for c in split.column_names if c != "labels"])

    def collator(self, processing_class: Any) -> Any:
        return DataCollatorWithPadding(processing_class) if self.columns else default_data_collator


@dataclass(frozen=True, kw_only=True)
class ImageClassification(Classification):
    """Images, prepared by the model's image processor as they are drawn, or pixels that the data carries."""

    kind: ClassVar[str] = "image_classification"
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    processor: ClassVar[Literal["tokenizer", "image_processor"]] = "image_processor"
    training_arguments: ClassVar[Mapping[str, Any]] = {"remove_unused_columns": False}  # models take no `image`
    model_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)

    @classmethod
    def fits(cls, config: DatasetConfig, features: Features) -> bool:
        """Images, or pixels as models take them."""
        if asks_for_completions(config):
            return False
        images = "pixel_values" in features or any(isinstance(feature, Image) for feature in features.values())
        return config.image_column is not None or images

    @classmethod
    def input_columns(cls, config: DatasetConfig, label_column: str, features: Features) -> tuple[str, ...]:
        if config.image_column is None and "pixel_values" in features:
            return ()
        images = [name for name, feature in features.items() if isinstance(feature, Image)]
        column = find("dataset.image_column", config.image_column, images, list(features), "column")
        if column not in images:
            raise ConfigurationError(
                f"dataset.image_column: {column!r} is {features[column]}; a column of images is needed, found: "
                f"{', '.join(images) or 'none'}."
            )
        return (column,)

    @property
    def metrics(self) -> tuple[str, ...]:
        if not self.labels:
            raise ConfigurationError("dataset.label_column: images need a class each; these are decimal numbers.")
        return super().metrics

    def encode(self, split: Dataset, processing_class: Any, max_length: int) -> Dataset:
        return split.select_columns([*self.columns, "labels"]) if self.columns else self._ready(split)

    def collator(self, processing_class: Any) -> Any:
        if not self.columns:
            return default_data_collator
        (column,) = self.columns

        def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            import torch

            images = [row[column].convert("RGB") for row in rows]
            pixels = processing_class(images=images, return_tensors="pt")["pixel_values"]
            return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

        return collate


def check_texts(key: str, columns: Sequence[str], features: Features, label_column: str | None = None) -> None:
    """Refuse columns that are not there or hold no texts."""
    for column in columns:
        find(key, column, (), list(features), "column")
        if column == label_column or not is_text(features[column]):
            what = "the label column" if column == label_column else f"{features[column]}"
            texts = [name for name, feature in features.items() if name != label_column and is_text(feature)]
            raise ConfigurationError(
                f"{key}: {column!r} is {what}; a column of texts is needed, found: {', '.join(texts) or 'none'}."
            )


def _label_column(config: DatasetConfig, train: Dataset) -> str:
    try:
        return find("dataset.label_column", config.label_column, LABEL_COLUMNS, train.column_names, "column")
    except ConfigurationError as error:
        if config.label_column is None and any(map(is_text, train.features.values())):
            raise ConfigurationError(f"{error} For texts without labels, set dataset.task to causal_lm.") from error
        raise
