from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from folders import write_bert, write_entities
from task_helpers import task_of
from transformers import AutoTokenizer

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.data.tasks import encode
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.runner import run_experiment


def write(folder: Path, train: dict[str, list[object]], validation: dict[str, list[object]] | None = None) -> Path:
    folder.mkdir()
    for split, columns in (("train", train), ("validation", validation or train)):
        Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")
    return folder


def test_words_and_tags_are_found(tmp_path: Path) -> None:
    task = task_of(write_entities(tmp_path / "people"))
    assert (task.kind, task.columns, task.labels) == ("token_classification", ("tokens",), ("O", "B-PER", "I-PER"))
    assert task.metric == "entity_f1"
    assert task_of(write_entities(tmp_path / "d", names=["NOUN", "VERB", "OTHER"])).metric == "accuracy"


def test_the_first_token_of_a_word_carries_its_tag(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_bert(tmp_path / "bert", weights=False))
    rows: dict[str, list[object]] = {"tokens": [["good", "goodplot"], ["bad"]], "ner_tags": [[1, 0], [1]]}
    tokenizer.add_tokens(["plot"])  # so that one word is two tokens
    train = encode(task_of(write(tmp_path / "d", rows)), tokenizer, 16).train
    tokens = tokenizer.convert_ids_to_tokens(train[0]["input_ids"])
    assert len(tokens) == 5  # [CLS] good [UNK] plot [SEP]
    assert train[0]["labels"] == [-100, 1, 0, -100, -100]
    assert set(train.column_names) >= {"input_ids", "attention_mask", "labels"}
    cut = encode(task_of(tmp_path / "d"), tokenizer, 3).train
    assert cut[0]["labels"] == [-100, 1, -100]


def test_tags_as_texts_become_classes(tmp_path: Path) -> None:
    rows: dict[str, list[object]] = {"words": [["a", "b"]], "tags": [["VERB", "NOUN"]]}
    task = task_of(write(tmp_path / "d", rows))
    assert (task.labels, task.train[0]["labels"]) == (("NOUN", "VERB"), [1, 0])


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ([["a", "b"], [0]], None, "row 0 of the split 'train' has 2 words in 'tokens' and 1 tags"),
        ([["a", "b"], [0, 0]], None, "one class only"),
        ([["a", "b"], [0, -1]], None, "labels run from -1 to 0; 0 to 0 are allowed"),
        ([["a", "b"], ["X", "Y"]], [["a"], ["Z"]], r"tags the training split lacks: \['Z'\]"),
    ],
)
def test_tags_that_cannot_be_learned_are_refused(
    tmp_path: Path, train: list[object], validation: list[object] | None, message: str
) -> None:
    rows = [
        {"tokens": [split[0]], "ner_tags": [split[1]]} if split is not None else None for split in (train, validation)
    ]
    assert rows[0] is not None
    with pytest.raises(ConfigurationError, match=message):
        task_of(write(tmp_path / "d", rows[0], rows[1]))


def test_a_column_of_words_is_needed(tmp_path: Path) -> None:
    rows: dict[str, list[object]] = {"text": ["a b"], "ner_tags": [[0, 1]]}
    folder = write(tmp_path / "d", rows)
    with pytest.raises(ConfigurationError, match="token classification needs a column of lists of words"):
        task_of(folder, task="token_classification", text_column="text")


def test_entities_are_learned(experiment: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    config = experiment(
        f"dataset.load_args=[{write_entities(tmp_path / 'people')}]",
        "fish_tuning.methods_to_run=[lora-fish]",
        "training.args_override.num_train_epochs=8",
        "training.args_override.learning_rate=0.03",
        "training.args_override.per_device_train_batch_size=4",
    )
    (record,) = run_experiment(config, plan_experiment(config))
    assert record.status == "ok", record.error
    assert record.metrics.keys() == {"loss", "entity_f1", "accuracy", "f1_macro"}
    assert record.metrics["accuracy"] > 0.6  # always the commonest tag: 0.5


def test_the_constant_value_counts_first_tokens_alone(tmp_path: Path) -> None:
    task = task_of(write_entities(tmp_path / "d", names=["N", "V", "D"]), metric="accuracy")
    rows = {"labels": [[-100, 2, 2, -100], [2, 1]]}
    validation = {"labels": [[-100, 2, 1, -100, 2], [1]]}
    assert task.constant_value(Dataset.from_dict(rows), Dataset.from_dict(validation)) == 0.5
    entities = task_of(write_entities(tmp_path / "e"))
    assert entities.metric == "entity_f1"
    outside = Dataset.from_dict({"labels": [[0, 0, 1]]})
    assert entities.constant_value(outside, outside) == 0.0
