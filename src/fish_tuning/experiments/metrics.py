"""The metric of a task: accuracy, or what its benchmark prescribes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Metrics = dict[str, float]

# GLUE's own choice, and the mean where GLUE names two.
TASK_METRICS = {"cola": "matthews_correlation", "mrpc": "accuracy_f1", "qqp": "accuracy_f1"}


def main_metric(task_name: str, num_labels: int) -> str:
    """Name of the metric that a task is compared by: always larger is better."""
    if num_labels == 1:
        return "pearson_spearman"
    return TASK_METRICS.get(task_name.lower(), "accuracy") if num_labels == 2 else "accuracy"


def metric_function(num_labels: int) -> Callable[[Any], Metrics]:
    """`compute_metrics` for a Trainer: all metrics that fit the labels, each in its usual range."""
    return _regression if num_labels == 1 else _binary if num_labels == 2 else _classes


def _regression(prediction: Any) -> Metrics:
    from scipy.stats import pearsonr, spearmanr

    values, labels = np.ravel(_logits(prediction)), np.ravel(prediction.label_ids)
    pearson, spearman = float(pearsonr(values, labels)[0]), float(spearmanr(values, labels)[0])
    return {"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2}


def _binary(prediction: Any) -> Metrics:
    from sklearn.metrics import f1_score

    metrics = _classes(prediction)
    f1 = float(f1_score(prediction.label_ids, _logits(prediction).argmax(-1), zero_division=0))
    return metrics | {"f1": f1, "accuracy_f1": (metrics["accuracy"] + f1) / 2}


def _classes(prediction: Any) -> Metrics:
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    predicted, labels = _logits(prediction).argmax(-1), prediction.label_ids
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "matthews_correlation": float(matthews_corrcoef(labels, predicted)),
    }


def _logits(prediction: Any) -> Any:
    # Decoder models also return their key-value cache; the logits come first.
    predictions = prediction.predictions
    return predictions[0] if isinstance(predictions, tuple) else predictions
