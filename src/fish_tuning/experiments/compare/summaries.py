"""Means over seeds with their intervals, and paired differences to the baseline. Pure functions of run records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from fish_tuning.experiments.config.arm_names import baseline_of
from fish_tuning.experiments.records.run_record import RunRecord

FEWEST_FOR_INTERVAL = 3
__all__ = [
    "FEWEST_FOR_INTERVAL",
    "ArmSummary",
    "Interval",
    "baseline_of",
    "mean_interval",
    "paired_difference",
    "summarize",
]


@dataclass(frozen=True)
class Interval:
    """A mean over `n` values with its interval; no bounds for fewer than three values, no mean for none."""

    mean: float | None
    low: float | None
    high: float | None
    n: int

    @property
    def includes_zero(self) -> bool | None:
        """Whether the mean may as well be zero; None when there is no interval to tell it by."""
        if self.low is None or self.high is None:
            return None
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class ArmSummary:
    """An arm over its seeds. Times are means in seconds, peak memory the maximum in bytes; None where no run has it."""

    arm: str
    metric: str
    n_ok: int
    n_failed: int
    trainable_parameters: int | None
    mean: float | None
    low: float | None
    high: float | None
    difference: Interval | None  # to the method's dense arm, over the seeds that both finished; None for that arm
    train_seconds: float | None
    fisher_seconds: float | None
    peak_memory_bytes: int | None
    peak_memory_of: str
    optimizer_state_bytes: int | None
    adapter_bytes: int | None
    errors: list[str] = field(default_factory=list)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean and Student's t interval of independent values; bounds are None for fewer than three."""
    n = len(values)
    mean = fmean(values) if values else None
    if mean is None or n < FEWEST_FOR_INTERVAL or not all(map(math.isfinite, values)):
        return Interval(mean, None, None, n)
    from scipy.stats import t

    half = float(t.ppf((1 + confidence) / 2, n - 1)) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_difference(runs: Sequence[RunRecord], arm: str, baseline: str) -> Interval:
    """`arm` minus `baseline`, seed by seed: a seed's head, data order and luck are the same in both."""
    ours, theirs = _values(runs, arm), _values(runs, baseline)
    return mean_interval([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def summarize(runs: Sequence[RunRecord]) -> list[ArmSummary]:
    """One summary for each arm, in the order in which the arms first appear."""
    return [_summarize_arm(runs, arm, baseline_of(arm)) for arm in dict.fromkeys(run.arm for run in runs)]


def _summarize_arm(runs: Sequence[RunRecord], arm: str, baseline: str) -> ArmSummary:
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
        mean=score.mean,
        low=score.low,
        high=score.high,
        difference=None if arm == baseline else paired_difference(runs, arm, baseline),
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
