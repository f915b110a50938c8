"""Means, intervals and paired differences, against numbers worked out by hand or by scipy."""

from __future__ import annotations

import math

import pytest
from fakes import failed, ok, scores

from fish_tuning.experiments.compare.summaries import mean_interval, summarize


def test_interval_is_students_t() -> None:
    from scipy.stats import sem, t

    values = [0.71, 0.74, 0.69, 0.77]
    interval = mean_interval(values)
    low, high = t.interval(0.95, len(values) - 1, loc=sum(values) / 4, scale=sem(values))
    assert (interval.low, interval.high) == pytest.approx((low, high))
    assert mean_interval([1.0, 2.0, 3.0]).high == pytest.approx(2 + 4.302653 / math.sqrt(3))  # t(.975, 2) from a table
    wider = mean_interval(values, confidence=0.99)
    assert wider.low is not None
    assert interval.low is not None
    assert wider.low < interval.low


@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.7], [0.5, 0.6, math.nan], [0.1 + 0.2, 0.3, 0.3]])
def test_no_interval_from_too_few_broken_or_equal_values(values: list[float]) -> None:
    interval = mean_interval(values)
    assert interval.low is None
    assert interval.high is None
    assert interval.n == len(values)


def test_summary_of_each_arm() -> None:
    runs = [
        *scores("lora", [0.5, 0.6, 0.7]),
        ok("lora-fish", 1, 0.8, train_seconds=10.0, peak_memory_bytes=5, fisher_seconds=1.0),
        ok("lora-fish", 2, 0.9, train_seconds=20.0, peak_memory_bytes=9, fisher_seconds=2.0),
        failed("lora-fish", 3, "RuntimeError: no"),
    ]
    lora, fish = summarize(runs)
    assert (lora.arm, lora.n_ok, lora.n_failed) == ("lora", 3, 0)
    assert lora.mean == pytest.approx(0.6)
    assert lora.low is not None
    assert (fish.n_ok, fish.n_failed, fish.low) == (2, 1, None)
    assert (fish.train_seconds, fish.fisher_seconds, fish.peak_memory_bytes) == (15.0, 1.5, 9)
    assert fish.errors == ["seed 3: RuntimeError: no"]


def test_summary_of_an_arm_that_never_finished() -> None:
    (arm,) = summarize([failed("lora", 1), failed("lora", 2)])
    assert (arm.mean, arm.trainable_parameters, arm.train_seconds, arm.n_failed) == (None, None, None, 2)
    assert summarize([]) == []
