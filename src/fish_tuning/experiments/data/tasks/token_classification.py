"""Sentences in words with a class for each word, such as named entities or parts of speech."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

import numpy as np
from datasets import ClassLabel, Dataset, Features, List
from transformers import DataCollatorForTokenClassification, Trainer

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.sections import DatasetConfig
from fish_tuning.experiments.data.entities import are_entity_tags
from fish_tuning.experiments.data.metrics import ENTITY_METRICS, TOKEN_METRICS, Metrics, token_metrics
from fish_tuning.experiments.data.splits import Splits, find
from fish_tuning.experiments.data.tasks.base import Task, asks_for_completions, check_filled, first_present, is_text
from fish_tuning.experiments.data.tasks.labels import LABEL_COLUMNS, class_names
from fish_tuning.scores.losses import IGNORED

WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("ner_tags", "pos_tags", "chunk_tags", "tags", *LABEL_COLUMNS)


@dataclass(frozen=True, kw_only=True)
class TokenClassification(Task):
    """A class for each word; its first token stands for it, as in BERT's own named entity recognition."""

    kind: ClassVar[str] = "token_classification"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"

    @classmethod
    def fits(cls, config: DatasetConfig, features: Features) -> bool:
        """Lists of words with lists of tags."""
        words = config.text_column if isinstance(config.text_column, str) else first_present(WORD_COLUMNS, features)
        tags = config.label_column or first_present(TAG_COLUMNS, features)
        tagged = _is_list_of_texts(features.get(words)) and isinstance(features.get(tags), List)
        return tagged and not asks_for_completions(config)

    @classmethod
    def read(cls, config: DatasetConfig, splits: Splits) -> Task:
        train, validation = splits.all[splits.train], splits.all[splits.validation]
        words = _column(config.text_column, "dataset.text_column", WORD_COLUMNS, train.features)
        tags = _column(config.label_column, "dataset.label_column", TAG_COLUMNS, train.features)
        if not _is_list_of_texts(train.features[words]):
            raise ConfigurationError(
                f"dataset.text_column: {words!r} is {train.features[words]}; token classification needs a column of "
                "lists of words."
            )
        for name, split in ((splits.train, train), (splits.validation, validation)):
            check_filled(name, split, {words: "dataset.text_column", tags: "dataset.label_column"})
            _check_lengths(name, split, words, tags)
        names = _names(train, validation, tags)
        train, validation = (_numbered(split, words, tags, names) for split in (train, validation))
        return cls._made(config, splits, train, validation, columns=(words,), labels=names)

    @property
    def metrics(self) -> tuple[str, ...]:
        return ENTITY_METRICS if self.labels and are_entity_tags(self.labels) else TOKEN_METRICS

    def check(self, processing_class: Any, model_config: Any, max_length: int) -> list[str]:
        if not processing_class.is_fast:
            raise ConfigurationError(
                f"model.name: token classification needs a fast tokenizer, which tells the word of each token; "
                f"{type(processing_class).__name__} is none."
            )
        return []

    def encode(self, split: Dataset, processing_class: Any, max_length: int) -> Dataset:
        (words,) = self.columns

        def tokens(rows: Mapping[str, list[Any]]) -> Any:
            encoded = processing_class(rows[words], is_split_into_words=True, truncation=True, max_length=max_length)
            encoded["labels"] = [
                list(_of_first_tokens(encoded.word_ids(number), tags)) for number, tags in enumerate(rows["labels"])
            ]
            return encoded

        return split.map(tokens, batched=True, remove_columns=split.column_names)

    def collator(self, processing_class: Any) -> Any:
        return DataCollatorForTokenClassification(processing_class)

    def make_trainer(self, *, processing_class: Any, **arguments: Any) -> Trainer:
        # Class numbers are kept of the whole validation set, not the scores of every class.
        return super().make_trainer(
            processing_class=processing_class, preprocess_logits_for_metrics=_most_likely, **arguments
        )

    def compute_metrics(self, prediction: Any) -> Metrics:
        entities = ENTITY_METRICS[0] in self.metrics
        return token_metrics(prediction.predictions, prediction.label_ids, self.labels or (), entities=entities)

    def constant_value(self, train: Dataset, validation: Dataset) -> float | None:
        counts = Counter(tag for tags in train["labels"] for tag in tags if tag != IGNORED)
        truth = np.array([list(row) for row in zip_longest(*validation["labels"], fillvalue=IGNORED)])
        predicted = np.full(truth.shape, counts.most_common(1)[0][0])
        entities = ENTITY_METRICS[0] in self.metrics
        return token_metrics(predicted.T, truth.T, self.labels or (), entities=entities)[self.metric]


def _column(asked: Any, key: str, usual: tuple[str, ...], features: Features) -> str:
    if isinstance(asked, list):
        raise ConfigurationError(f"{key}={asked}: token classification reads one column of words.")
    return find(key, asked, usual, list(features), "column")


def _is_list_of_texts(feature: Any) -> bool:
    return isinstance(feature, List) and is_text(feature.feature)


def _check_lengths(name: str, split: Dataset, words: str, tags: str) -> None:
    for number, (sentence, labels) in enumerate(zip(split[words], split[tags], strict=True)):
        if len(sentence) != len(labels):
            raise ConfigurationError(
                f"dataset.label_column: row {number} of the split {name!r} has {len(sentence)} words in {words!r} and "
                f"{len(labels)} tags in {tags!r}; each word needs one."
            )


def _names(train: Dataset, validation: Dataset, column: str) -> tuple[str, ...]:
    feature = train.features[column]
    inner = feature.feature if isinstance(feature, List) else None
    seen = [{tag for tags in split[column] for tag in tags} for split in (train, validation)]
    if is_text(inner):
        unknown = seen[1] - seen[0]
        if unknown:
            raise ConfigurationError(
                f"dataset.label_column: the validation split has tags the training split lacks: {sorted(unknown)}."
            )
        names = tuple(sorted(seen[0]))
    elif isinstance(inner, ClassLabel) or "int" in str(getattr(inner, "dtype", "")):
        names = class_names(inner, *seen) if any(seen) else ()
    else:
        raise ConfigurationError(
            f"dataset.label_column: {column!r} is {feature}; token classification needs a list of classes a row."
        )
    if len(seen[0]) < 2:
        raise ConfigurationError(f"dataset.label_column: {column!r} has one class only; there is nothing to learn.")
    return names


def _numbered(split: Dataset, words: str, tags: str, names: tuple[str, ...]) -> Dataset:
    number = {name: index for index, name in enumerate(names)}
    split = split.select_columns([words, tags])
    split = split if tags == "labels" else split.rename_column(tags, "labels")
    if not is_text(split.features["labels"].feature):
        return split
    return split.map(
        lambda row: {"tags": [number[tag] for tag in row["labels"]]}, remove_columns="labels"
    ).rename_column("tags", "labels")


def _of_first_tokens(word_ids: list[int | None], tags: list[int]) -> Iterator[int]:
    """The tag of each word at its first token, -100 at the others and at special tokens."""
    before = None
    for word in word_ids:
        yield IGNORED if word is None or word == before else tags[word]
        before = word


def _most_likely(logits: Any, labels: Any) -> Any:
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.argmax(dim=-1)
