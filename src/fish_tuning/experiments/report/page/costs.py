"""What a run of each arm costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from fish_tuning.experiments.report.page.results import Results


@dataclass(frozen=True)
class Cost:
    """Seconds are means over seeds, then over tasks; bytes the largest of any run. None where no run has it."""

    arm: str
    runs: int
    scoring: float | None
    training: float | None
    peak_memory: int | None
    memory_of: str
    optimizer: int | None
    adapter: int | None


def costs(results: Results) -> list[Cost]:
    """For each arm that finished a run."""
    return [_cost(results, arm) for arm in results.arms if results.of_arm(arm)]


def _cost(results: Results, arm: str) -> Cost:
    runs = results.of_arm(arm)
    return Cost(
        arm=arm,
        runs=len(runs),
        scoring=_mean([(run.task, run.fisher_seconds) for run in runs]),
        training=_mean([(run.task, run.train_seconds) for run in runs]),
        peak_memory=_largest([run.peak_memory_bytes for run in runs]),
        memory_of=" or ".join(dict.fromkeys("GPU" if run.peak_memory_of == "gpu" else "process" for run in runs)),
        optimizer=_largest([run.optimizer_state_bytes for run in runs]),
        adapter=_largest([run.adapter_bytes for run in runs]),
    )


def _mean(values: Sequence[tuple[str, float | None]]) -> float | None:
    by_task: dict[str, list[float]] = defaultdict(list)
    for task, value in values:
        if value is not None:
            by_task[task].append(value)
    return fmean(map(fmean, by_task.values())) if by_task else None


def _largest(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
