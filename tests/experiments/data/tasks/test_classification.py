from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from folders import write_bert, write_llama, write_pairs
from task_helpers import task_of, write_split
from transformers import AutoTokenizer, EvalPrediction

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.sections import DatasetConfig
from fish_tuning.experiments.data.metrics import class_metrics
from fish_tuning.experiments.data.tasks import encode, labels, load_task
from fish_tuning.experiments.models.building import build_model
from fish_tuning.experiments.run.plan import plan_experiment


def test_a_single_text_column_is_found(sentences_folder: Path) -> None:
    task = task_of(sentences_folder)
    assert (task.name, task.kind, task.columns) == ("reviews", "text_classification", ("text",))
    assert (task.train_split, task.validation_split) == ("train", "validation")
    assert (task.labels, task.num_labels) == (("0", "1"), 2)
    assert "labels" in task.train.column_names


def test_a_pair_and_a_float_label_are_a_pair_regression(tmp_path: Path) -> None:
    task = task_of(write_pairs(tmp_path / "pairs"))
    assert task.columns == ("sentence1", "sentence2")
    assert (task.labels, task.num_labels) == (None, 1)


def test_text_labels_become_classes_in_alphabetical_order(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        write_split(tmp_path / "d", split, {"text": ["a", "b", "c"], "label": ["yes", "no", "yes"]})
    task = task_of(tmp_path / "d")
    assert task.labels == ("no", "yes")
    assert list(task.train["labels"]) == [1, 0, 1]


def test_class_names_of_the_data_set_are_kept(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos", "unclear"])})
    for split in ("train", "validation"):
        write_split(tmp_path / "d", split, {"text": ["a", "b"], "label": [0, 1]}, features)
    assert task_of(tmp_path / "d").labels == ("neg", "pos", "unclear")


def test_ready_inputs_are_used_as_they_are(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        columns = {"input_ids": [[1, 2], [3, 4]], "label": [0, 1], "idx": [0, 1]}
        write_split(tmp_path / "d", split, columns)  # type: ignore[arg-type]
    task = task_of(tmp_path / "d")
    assert (task.kind, task.columns, task.encodes) == ("text_classification", (), False)
    train = encode(task, None, 8).train
    assert sorted(train.column_names) == ["input_ids", "labels"]


def test_tokenized_splits_hold_model_inputs_alone_and_are_cut(tmp_path: Path) -> None:
    task = task_of(write_pairs(tmp_path / "pairs"))
    tokenizer = AutoTokenizer.from_pretrained(write_bert(tmp_path / "bert", weights=False))
    train, validation, _ = encode(task, tokenizer, 6)
    assert set(train.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert max(map(len, [*train["input_ids"], *validation["input_ids"]])) == 6
    assert {1} < set(train["token_type_ids"][0])  # the second sentence is there


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_column": "txt"}, r"there is no column 'txt'; found: text, label\. Did you mean 'text'\?"),
        ({"label_column": "labels"}, "there is no column 'labels'.*Did you mean 'label'"),
        ({"validation_split": "validate"}, "there is no split 'validate'; found: train, validation.*'validation'"),
    ],
)
def test_what_is_not_there_is_told_with_the_nearest(
    sentences_folder: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        task_of(sentences_folder, **settings)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": ["x", "y"], "b": ["x", "y"], "c": ["x", "y"], "label": [0, 1]}, "found 3 .a, b, c."),
        ({"text": ["x", "y"], "label": [-1, -1]}, "labels run from -1 to -1; a split whose .* hidden labels"),
        ({"text": ["x", "y"], "label": [-1, 1]}, "labels run from -1 to 1; 0 to 1 are allowed. Number the classes"),
        (
            {"text": ["x", None], "label": [0, 1]},
            r"text_column: the column 'text' is empty \(null\) in 1 of the 2 rows",
        ),
        ({"text": ["x", "y"], "label": [0, None]}, r"label_column: the column 'label' is empty \(null\) in 1 of"),
        ({"text": ["x", "y"], "label": [0.5, float("nan")]}, "not finite"),
        ({"text": ["x", "y"], "label": [1, 1]}, "the 2 rows of the split 'train' have one class only"),
        ({"text": ["x", "y"], "label": [0.5, 0.5]}, "the split 'train' have one value only; there is nothing to learn"),
        ({"text": ["x", "y"], "other": [1, 1]}, "none of the usual names"),
        ({"text": [], "label": []}, "is empty|has no rows"),
    ],
)
def test_data_that_cannot_be_learned_from_is_refused(
    tmp_path: Path, columns: dict[str, list[object]], message: str
) -> None:
    for split in ("train", "validation"):
        write_split(tmp_path / "d", split, columns)
    with pytest.raises(ConfigurationError, match=message):
        task_of(tmp_path / "d")


def test_whole_numbers_with_gaps_are_names_of_classes(tmp_path: Path) -> None:
    write_split(tmp_path / "d", "train", {"text": ["a", "b", "c"], "label": [5, 1, 10**12]})
    write_split(tmp_path / "d", "validation", {"text": ["a", "b"], "label": [7, 5]})
    task = task_of(tmp_path / "d")
    assert task.labels == ("1", "5", "7", "1000000000000")
    assert (list(task.train["labels"]), list(task.validation["labels"])) == ([1, 0, 3], [2, 1])
    write_split(tmp_path / "e", "train", {"text": ["a", "b"], "label": [0, 2]})
    write_split(tmp_path / "e", "validation", {"text": ["a", "b"], "label": [1, 2]})
    assert list(task_of(tmp_path / "e").train["labels"]) == [0, 2]  # none is missing in both


def test_more_numbers_than_classes_can_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "MOST_CLASSES", 3)
    for name, numbers in (("gaps", [2, 5, 7, 9]), ("none", [0, 1, 2, 3])):
        for split in ("train", "validation"):
            write_split(tmp_path / name, split, {"text": list("abcd"), "label": numbers})
        with pytest.raises(ConfigurationError, match=r"label_column: .* are the most"):
            task_of(tmp_path / name)


def test_a_validation_label_that_training_lacks_is_refused(tmp_path: Path) -> None:
    write_split(tmp_path / "d", "train", {"text": ["x", "y"], "label": ["a", "b"]})
    write_split(tmp_path / "d", "validation", {"text": ["x", "y"], "label": ["a", "c"]})
    with pytest.raises(ConfigurationError, match=r"labels the training split lacks: \['c'\]"):
        task_of(tmp_path / "d")


def test_true_and_false_are_classes(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_split(tmp_path / "d", split, {"text": ["a", "b"], "label": [True, False]})
    task = task_of(tmp_path / "d")
    assert (task.labels, list(task.train["labels"])) == (("false", "true"), [1, 0])


def test_of_label_and_labels_the_unused_one_is_dropped(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_split(tmp_path / "d", split, {"text": ["a", "b"], "label": [1, 0], "labels": ["x", "y"]})
    assert list(task_of(tmp_path / "d").train["labels"]) == [1, 0]
    assert task_of(tmp_path / "d", label_column="labels").labels == ("x", "y")


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_validation_split_without_labels_is_told(tmp_path: Path, ending: str) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    for split, columns in (("train", {"text": ["a", "b"], "label": [0, 1]}), ("validation", {"text": ["a", "b"]})):
        getattr(Dataset.from_dict(columns), f"to_{ending}")(folder / f"{split}.{ending}")
    with pytest.raises(ConfigurationError, match=r"dataset\.(label_column: .*validation_split|load_args: .*label)"):
        task_of(folder)


def test_a_text_column_must_hold_texts(sentences_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'label' is the label column; a column of texts.* found: text"):
        task_of(sentences_folder, text_column="label")
    for split in ("train", "validation"):
        write_split(tmp_path / "d", split, {"text": ["a", "b"], "number": [1, 2], "label": [0, 1]})
    with pytest.raises(ConfigurationError, match=r"'number' is Value\('int64'\); a column of texts"):
        task_of(tmp_path / "d", text_column=["text", "number"])


def test_both_sets_of_mnli_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "mnli"
    (folder / "data").mkdir(parents=True)  # where split names may hold underscores
    rows = Dataset.from_dict({"premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"], "label": [0, 1, 2]})
    for split in ("train", "validation_matched", "validation_mismatched"):
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    task = load_task(DatasetConfig(load_args=[str(folder)]))
    assert (task.validation_split, list(task.more_validation)) == ("validation_matched", ["mismatched"])
    assert "labels" in task.more_validation["mismatched"].column_names
    alone = load_task(DatasetConfig(load_args=[str(folder)], validation_split="validation_mismatched"))
    assert not alone.more_validation


def test_one_class_in_the_validation_rows_is_refused(sentences_folder: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"the 1 rows of the split 'validation' have one class only; .*measure"
    ):
        task_of(sentences_folder, max_validation_samples=1)
    assert len(task_of(sentences_folder, max_validation_samples=12).validation) == 12


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            "pearson",
            "does not fit reviews, which is text classification with 2 classes; what fits is accuracy, matthews",
        ),
        ("acuracy", "Did you mean 'accuracy'"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused(sentences_folder: Path, metric: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        task_of(sentences_folder, metric=metric)


def test_a_metric_may_be_asked_for(sentences_folder: Path) -> None:
    assert task_of(sentences_folder, metric="f1").metric == "f1"


def test_predictions_are_measured_by_all_metrics_that_fit(sentences_folder: Path, tmp_path: Path) -> None:
    logits, labels = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), np.array([0, 1, 0, 0])
    task = task_of(sentences_folder)
    metrics = task.compute_metrics(EvalPrediction(logits, labels))
    assert metrics == class_metrics(np.array([0, 1, 1, 0]), labels, 2)
    assert metrics.keys() == set(task.metrics)
    # A decoder's cache comes after the logits.
    assert task.compute_metrics(EvalPrediction((logits, np.zeros(3)), labels)) == metrics
    pairs = task_of(write_pairs(tmp_path / "pairs"))
    assert pairs.compute_metrics(EvalPrediction(logits[:, :1], logits[:, 0] * 2))["pearson"] == pytest.approx(1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_classifies_by_its_last_token_on_whatever_side_it_is_padded(
    experiment: Callable[..., ExperimentConfig], tmp_path: Path, side: str
) -> None:
    folder = write_llama(tmp_path / "llama")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"padding_side": side, "pad_token": "<unk>"}  # another one than the model's configuration names
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = experiment(f"model.name={folder}", "fish_tuning.methods_to_run=[lora]")
    plan = plan_experiment(config)
    model = build_model(config, plan.model_config, plan.task, config.peft[0], config.variant_of("lora"), seed=0).eval()
    rows = [{"input_ids": ids} for ids in ([5, 6, 7], [8, 9, 10, 11, 12], [13])]
    batch = plan.task.collator(plan.processing_class)(rows)
    assert (batch["input_ids"][2, 0] == 13) == (side == "right")
    alone = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    assert torch.allclose(model(**batch).logits, torch.stack(alone), atol=1e-6)


def test_the_constant_value_is_that_of_the_commonest_training_class(tmp_path: Path) -> None:
    write_split(tmp_path / "d", "train", {"text": ["a"] * 5, "label": [2, 2, 2, 0, 1]})
    write_split(tmp_path / "d", "validation", {"text": ["a"] * 4, "label": [2, 0, 0, 1]})
    for metric, value in (("accuracy", 0.25), ("f1_macro", 0.4 / 3), ("matthews_correlation", 0.0)):
        task = task_of(tmp_path / "d", metric=metric)
        assert task.constant_value(task.train, task.validation) == pytest.approx(value)


def test_a_constant_correlates_with_nothing(tmp_path: Path) -> None:
    task = task_of(write_pairs(tmp_path / "pairs"))
    assert task.constant_value(task.train, task.validation) == 0.0
