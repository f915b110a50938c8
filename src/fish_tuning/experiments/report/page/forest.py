"""Differences in words."""

from __future__ import annotations

from fish_tuning.experiments.compare.comparisons import Comparison


def spoken_difference(comparison: Comparison) -> str:
    """`-0.012 [-0.028, +0.005]`, without the brackets where there is no interval."""
    if comparison.mean_difference is None:
        return "no pair"
    return f"{signed(comparison.mean_difference)} {spoken_bounds(comparison.low, comparison.high)}".strip()


def spoken_bounds(low: float | None, high: float | None) -> str:
    """`[-0.028, +0.005]`, or nothing."""
    return "" if low is None or high is None else f"[{signed(low)}, {signed(high)}]"


def signed(value: float) -> str:
    """`+0.012`, and `+0.000` for what rounds to nothing."""
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", "\N{MINUS SIGN}")
