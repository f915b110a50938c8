"""The metrics of each kind of task, by name: always larger is better."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from fish_tuning.experiments.data.entities import entity_f1
from fish_tuning.scores.losses import IGNORED

Metrics = dict[str, float]

# The names that fit, the usual one first.
REGRESSION_METRICS = ("pearson_spearman", "pearson", "spearman")
CLASS_METRICS = ("accuracy", "matthews_correlation", "f1_macro")
BINARY_METRICS = (*CLASS_METRICS, "f1", "accuracy_f1")
TOKEN_METRICS = ("accuracy", "f1_macro")
ENTITY_METRICS = ("entity_f1", *TOKEN_METRICS)
LIKELIHOOD_METRICS = ("log_likelihood", "token_accuracy")
# Of answers that the model writes: the whole text, or the last number in it, is that of the reference.
GENERATED_METRICS = ("exact_match", "exact_match_number")

# What a benchmark is measured by, where that is not the usual metric; GLUE's mean where it names two.
BENCHMARK_METRICS = {
    "cola": "matthews_correlation",
    "mrpc": "accuracy_f1",
    "qqp": "accuracy_f1",
    "gsm8k": "exact_match_number",
}

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def usual_metric(task_name: str, fitting: Sequence[str]) -> str:
    """The metric that a task is compared by unless another is asked for: its benchmark's, else the first that fits."""
    benchmark = BENCHMARK_METRICS.get(task_name.lower(), fitting[0])
    return benchmark if benchmark in fitting else fitting[0]


def regression_metrics(predicted: Any, truth: Any) -> Metrics:
    """Correlations of (n, 1) or (n,) predictions with (n,) true values."""
    from scipy.stats import pearsonr, spearmanr

    values, labels = np.ravel(predicted), np.ravel(truth)
    pearson, spearman = float(pearsonr(values, labels)[0]), float(spearmanr(values, labels)[0])
    return {"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2}


def class_metrics(predicted: Any, truth: Any, num_labels: int) -> Metrics:
    """Of (n,) class numbers and the true ones; F1 of class 1 where there are two classes."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    metrics = {
        "accuracy": float(accuracy_score(truth, predicted)),
        "matthews_correlation": float(matthews_corrcoef(truth, predicted)),
        "f1_macro": float(f1_score(truth, predicted, average="macro", zero_division=0)),
    }
    if num_labels == 2:
        metrics["f1"] = float(f1_score(truth, predicted, zero_division=0))
        metrics["accuracy_f1"] = (metrics["accuracy"] + metrics["f1"]) / 2
    return metrics


def token_metrics(predicted: Any, truth: Any, labels: Sequence[str], *, entities: bool) -> Metrics:
    """Of (n, T) class numbers of tokens, where the true one is not -100; with `entities`, F1 of whole entities too."""
    from sklearn.metrics import accuracy_score, f1_score

    counted = truth != IGNORED
    metrics = {
        "accuracy": float(accuracy_score(truth[counted], predicted[counted])),
        "f1_macro": float(f1_score(truth[counted], predicted[counted], average="macro", zero_division=0)),
    }
    if entities:
        rows = [
            ([labels[i] for i in p[c]], [labels[i] for i in t[c]])
            for p, t, c in zip(predicted, truth, counted, strict=True)
        ]
        metrics["entity_f1"] = entity_f1([p for p, _ in rows], [t for _, t in rows])
    return metrics


def exact_match(answers: Sequence[str], references: Sequence[str]) -> Metrics:
    """Shares of answers that equal their reference: the whole text without space around it, and its last number."""
    pairs = list(zip(answers, references, strict=True))
    whole = sum(answer.strip() == reference.strip() for answer, reference in pairs)
    numbers = [(last_number(answer), last_number(reference)) for answer, reference in pairs]
    matching = sum(answer is not None and answer == reference for answer, reference in numbers)
    return {"exact_match": whole / len(pairs), "exact_match_number": matching / len(pairs)}


def last_number(text: str) -> Decimal | None:
    """The last number in a text, `1,234.50` like 1234.5; None where there is none."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None
