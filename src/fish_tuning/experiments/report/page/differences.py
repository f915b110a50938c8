"""Differences in words."""

from __future__ import annotations

from fish_tuning.experiments.compare import numbers
from fish_tuning.experiments.compare.comparisons import Comparison


def spoken_difference(comparison: Comparison) -> str:
    """`-0.012 [-0.028, +0.005]` with its corrected interval, without the brackets where there is none."""
    if comparison.mean_difference is None:
        return "no pair"
    return f"{signed(comparison.mean_difference)} {spoken_bounds(comparison.low, comparison.high)}".strip()


def spoken_bounds(low: float | None, high: float | None) -> str:
    """`[-0.028, +0.005]`, or nothing."""
    return "" if low is None or high is None else f"[{bound(low)}, {bound(high)}]"


def signed(value: float) -> str:
    return numbers.typeset(numbers.signed(value))


def bound(value: float) -> str:
    """One end of an interval, with as many digits as tell on which side of zero it is."""
    return numbers.typeset(numbers.bound(value))
