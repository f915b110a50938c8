"""Means over seeds with their intervals. Pure functions of run records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from fish_tuning.experiments.compare.paired import TIE
from fish_tuning.experiments.records.run_record import RunRecord

FEWEST_FOR_INTERVAL = 3


@dataclass(frozen=True)
class Interval:
    """A mean over `n` values with its interval; no bounds for fewer than three values, no mean for none."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class ArmSummary:
    """An arm over its seeds. Times are means in seconds, peak memory the maximum in bytes; None where no run has it."""

    arm: str
    metric: str
    n_ok: int
    n_failed: int
    trainable_parameters: int | None
    kept_parameters: int | None  # of these the chosen entries of the adapter, a dense arm's all
    head_parameters: int | None  # and what trains as a whole beside them
    mean: float | None
    low: float | None
    high: float | None
    train_seconds: float | None
    fisher_seconds: float | None
    peak_memory_bytes: int | None
    peak_memory_of: str
    optimizer_state_bytes: int | None
    adapter_bytes: int | None
    errors: list[str] = field(default_factory=list)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean and Student's t interval of independent values; bounds are None for fewer than three, and where all are
    equal: an interval of no width would claim to be sure.
    """
    n = len(values)
    mean = fmean(values) if values else None
    if mean is None or n < FEWEST_FOR_INTERVAL or not all(map(math.isfinite, values)) or all_equal(values):
        return Interval(mean, None, None, n)
    from scipy.stats import t

    half = float(t.ppf((1 + confidence) / 2, n - 1)) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def all_equal(values: Sequence[float]) -> bool:
    """Whether values are equal up to rounding, and so tell nothing of their spread."""
    return max(values) - min(values) < TIE


def summarize(runs: Sequence[RunRecord]) -> list[ArmSummary]:
    """One summary for each arm, in the order in which the arms first appear."""
    return [_summarize_arm(runs, arm) for arm in dict.fromkeys(run.arm for run in runs)]


def _summarize_arm(runs: Sequence[RunRecord], arm: str) -> ArmSummary:
    mine = [run for run in runs if run.arm == arm]
    ok = [run for run in mine if run.status == "ok"]
    failed = [run for run in mine if run.status != "ok"]
    score = mean_interval(list(_values(mine, arm).values()))
    return ArmSummary(
        arm=arm,
        metric=mine[0].metric,
        n_ok=len(ok),
        n_failed=len(failed),
        trainable_parameters=_largest([run.trainable_parameters for run in ok]),
        kept_parameters=_largest([run.kept_parameters for run in ok]),
        head_parameters=_largest([run.head_parameters for run in ok]),
        mean=score.mean,
        low=score.low,
        high=score.high,
        train_seconds=_mean([run.train_seconds for run in ok]),
        fisher_seconds=_mean([run.fisher_seconds for run in ok]),
        peak_memory_bytes=_largest([run.peak_memory_bytes for run in ok]),
        peak_memory_of=(ok or mine)[0].peak_memory_of,
        optimizer_state_bytes=_largest([run.optimizer_state_bytes for run in ok]),
        adapter_bytes=_largest([run.adapter_bytes for run in ok]),
        errors=[f"seed {run.seed}: {run.error or 'failed without a message'}" for run in failed],
    )


def _values(runs: Sequence[RunRecord], arm: str) -> dict[int, float]:
    return {run.seed: run.value for run in runs if run.arm == arm and run.status == "ok" and run.value is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _largest(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
