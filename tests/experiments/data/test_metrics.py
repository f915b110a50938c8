from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest

from fish_tuning.experiments.data.entities import are_entity_tags, entities, entity_f1
from fish_tuning.experiments.data.metrics import (
    BINARY_METRICS,
    CLASS_METRICS,
    ENTITY_METRICS,
    GENERATED_METRICS,
    LIKELIHOOD_METRICS,
    REGRESSION_METRICS,
    class_metrics,
    exact_match,
    last_number,
    regression_metrics,
    token_metrics,
    usual_metric,
)

PREDICTED, TRUTH = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])


def test_binary_metrics_by_hand() -> None:
    metrics = class_metrics(PREDICTED, TRUTH, 2)
    assert metrics["accuracy"] == 0.75
    assert metrics["f1"] == pytest.approx(2 / 3)  # precision 1/2, recall 1
    assert metrics["accuracy_f1"] == pytest.approx((0.75 + 2 / 3) / 2)
    assert metrics["matthews_correlation"] == pytest.approx(2 / np.sqrt(2 * 1 * 3 * 2))
    assert metrics["f1_macro"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert set(metrics) == set(BINARY_METRICS)
    assert set(class_metrics(PREDICTED, TRUTH, 3)) == set(CLASS_METRICS)


def test_regression_metrics_by_hand() -> None:
    metrics = regression_metrics(np.array([[1.0], [2.0], [4.0]]), np.array([0.0, 1.0, 3.0]))
    assert metrics == pytest.approx(dict.fromkeys(REGRESSION_METRICS, 1))


@pytest.mark.parametrize(
    ("task", "fitting", "metric"),
    [
        ("sst2", BINARY_METRICS, "accuracy"),
        ("CoLA", BINARY_METRICS, "matthews_correlation"),
        ("mrpc", BINARY_METRICS, "accuracy_f1"),
        ("mrpc", CLASS_METRICS, "accuracy"),  # of the same name, but with more classes
        ("stsb", REGRESSION_METRICS, "pearson_spearman"),
        ("conll2003", ENTITY_METRICS, "entity_f1"),
        ("gsm8k", (*LIKELIHOOD_METRICS, *GENERATED_METRICS), "exact_match_number"),
        ("stories", LIKELIHOOD_METRICS, "log_likelihood"),
    ],
)
def test_the_usual_metric_is_the_benchmark_s_where_it_fits(task: str, fitting: tuple[str, ...], metric: str) -> None:
    assert usual_metric(task, fitting) == metric


LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", []),
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("I-LOC I-LOC", [("LOC", 0, 2)]),  # begun without a B
        ("B-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),
        ("O I-PER O I-PER", [("PER", 1, 2), ("PER", 3, 4)]),
    ],
)
def test_entities_by_hand(tags: str, found: list[tuple[str, int, int]]) -> None:
    assert list(entities(tags.split())) == found


def test_an_entity_counts_when_type_and_both_ends_are_right() -> None:
    truth = [["B-PER", "I-PER", "O"], ["B-LOC"]]
    assert entity_f1(truth, truth) == 1
    # One of two found entities is right, one of two true ones is found.
    assert entity_f1([["B-PER", "O", "O"], ["B-LOC"]], truth) == 0.5
    assert entity_f1([["O", "O", "O"], ["O"]], truth) == 0


def test_entity_tags_are_told_from_other_classes() -> None:
    assert are_entity_tags(LABELS)
    assert not are_entity_tags(["NOUN", "VERB"])
    assert not are_entity_tags(["O"])


def test_token_metrics_leave_out_what_is_not_counted() -> None:
    predicted, truth = np.array([[1, 2, 3], [0, 0, 4]]), np.array([[1, 2, -100], [-100, 3, 4]])
    metrics = token_metrics(predicted, truth, LABELS, entities=True)
    assert metrics["accuracy"] == 0.75  # 1 2 . . 0 4 against 1 2 . . 3 4
    assert metrics["entity_f1"] == 0.5  # the person, but the place begins elsewhere
    assert set(metrics) == set(ENTITY_METRICS)
    assert "entity_f1" not in token_metrics(predicted, truth, LABELS, entities=False)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = <<3+4=7>>7 eggs.\n#### 7", 7),
        ("1,234.50", Decimal("1234.5")),
        ("it is -3.", -3),
        ("18.0", 18),
        ("none", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: object) -> None:
    assert last_number(text) == number


def test_exact_match_of_texts_and_of_numbers() -> None:
    metrics = exact_match([" yes ", "the answer is 1,000", "no idea"], ["yes", "#### 1000", "no"])
    assert metrics == pytest.approx({"exact_match": 1 / 3, "exact_match_number": 1 / 3})
