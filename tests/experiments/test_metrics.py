from __future__ import annotations

import numpy as np
import pytest
from transformers import EvalPrediction

from fish_tuning.experiments.metrics import main_metric, metric_function

LOGITS = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]])  # predicts 0, 1, 1, 0
LABELS = np.array([0, 1, 0, 0])


def test_binary_metrics_by_hand() -> None:
    metrics = metric_function(2)(EvalPrediction(LOGITS, LABELS))
    assert metrics["accuracy"] == 0.75
    assert metrics["f1"] == pytest.approx(2 / 3)  # precision 1/2, recall 1
    assert metrics["accuracy_f1"] == pytest.approx((0.75 + 2 / 3) / 2)
    assert metrics["matthews_correlation"] == pytest.approx(2 / np.sqrt(2 * 1 * 3 * 2))


def test_regression_metrics_by_hand() -> None:
    values = EvalPrediction(np.array([[1.0], [2.0], [4.0]]), np.array([0.0, 1.0, 3.0]))
    assert metric_function(1)(values) == pytest.approx({"pearson": 1, "spearman": 1, "pearson_spearman": 1})


def test_a_cache_behind_the_logits_is_ignored() -> None:
    alone = metric_function(2)(EvalPrediction(LOGITS, LABELS))
    assert metric_function(2)(EvalPrediction((LOGITS, np.zeros(3)), LABELS)) == alone


@pytest.mark.parametrize(
    ("task", "labels", "metric"),
    [
        ("sst2", 2, "accuracy"),
        ("cola", 2, "matthews_correlation"),
        ("mrpc", 2, "accuracy_f1"),
        ("stsb", 1, "pearson_spearman"),
        ("reviews", 5, "accuracy"),
    ],
)
def test_the_main_metric_is_the_benchmark_s_and_is_computed(task: str, labels: int, metric: str) -> None:
    assert main_metric(task, labels) == metric
    logits = np.random.default_rng(0).normal(size=(6, labels))
    assert metric in metric_function(labels)(EvalPrediction(logits, np.arange(6) % max(labels, 2)))
