"""Runs of one or more experiments joined: scores of every arm on every task, and what the comparisons say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from fish_tuning.experiments.arm_names import SELECTIONS, ArmName
from fish_tuning.experiments.comparisons import TIE, Comparison, compare, holm, stratified_interval
from fish_tuning.experiments.page.columns import column_labels
from fish_tuning.experiments.page.load import Experiment
from fish_tuning.experiments.records import RunRecord
from fish_tuning.experiments.statistics import FEWEST_FOR_INTERVAL, mean_interval

ALPHA = 0.05
NOT_A_NUMBER = "The metric is not a number."


@dataclass(frozen=True)
class Score:
    """One arm on one task, or over all of them; `mean` is None when nothing finished."""

    mean: float | None
    low: float | None
    high: float | None
    values: tuple[float, ...]  # of the seeds; of an average: the means of the tasks
    n_failed: int = 0
    n_missing: int = 0


@dataclass(frozen=True)
class Results:
    """`tasks` are labels: a task, and with it the model or the experiment where one task alone would be ambiguous."""

    runs: tuple[RunRecord, ...]  # each with the label of its column as `task`; failed ones included
    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    metrics: dict[str, str]  # task -> metric
    scores: dict[tuple[str, str], Score]  # arm, task
    averages: dict[str, Score]  # empty when there is one task, or one task under several settings
    comparisons: tuple[Comparison, ...]  # of each arm over all tasks
    by_task: dict[tuple[str, str], Comparison]  # arm, task; corrected over all arms and tasks
    missing: tuple[tuple[str, str, int], ...]  # task, arm, seed
    notes: tuple[str, ...]

    @property
    def failed(self) -> list[RunRecord]:
        return [run for run in self.runs if not finished(run)]

    def of_arm(self, arm: str) -> list[RunRecord]:
        """The runs of an arm that finished."""
        return [run for run in self.runs if run.arm == arm and finished(run)]

    def parameters(self, arm: str) -> tuple[int, int] | None:
        """Fewest and most trainable parameters; tasks may differ by their heads."""
        known = [int(run.trainable_parameters) for run in self.of_arm(arm) if run.trainable_parameters]
        return (min(known), max(known)) if known else None

    def comparison(self, arm: str) -> Comparison | None:
        return next((comparison for comparison in self.comparisons if comparison.arm == arm), None)


def finished(run: RunRecord) -> bool:
    return run.status == "ok" and run.value is not None and math.isfinite(run.value)


def join_results(experiments: Sequence[Experiment]) -> Results:
    """Join the runs; see `column_labels` for which experiments share a column."""
    labels, notes = column_labels(experiments)
    unique = {
        (labels[experiment.folder], run.arm, run.seed): replace(run, task=labels[experiment.folder])
        for experiment in experiments
        for run in experiment.runs
    }
    runs = [run if finished(run) else replace(run, error=run.error or NOT_A_NUMBER) for run in unique.values()]
    planned = [(labels[each.folder], arm, seed) for each in experiments for arm, seed in each.planned]
    missing = [key for key in dict.fromkeys(planned) if key not in unique]
    tasks = tuple(dict.fromkeys(labels.values()))
    arms = _in_order([*(arm for _, arm, _ in planned), *(run.arm for run in runs)])
    scores = {(arm, task): _score(runs, missing, arm, task) for arm in arms for task in tasks}
    averages = {}
    if len({run.task for each in experiments for run in each.runs}) < len(tasks):
        notes.append(
            "One task stands under several models or settings: there is no average over tasks, and the differences "
            "over all columns count it several times; those of each task are apart."
        )
    elif len(tasks) > 1:
        averages = {arm: _average([scores[arm, task] for task in tasks]) for arm in arms}
    return Results(
        runs=tuple(runs),
        tasks=tasks,
        arms=arms,
        metrics={run.task: run.metric for run in reversed(runs)},
        scores=scores,
        averages=averages,
        comparisons=tuple(sorted(compare(runs), key=lambda comparison: arms.index(comparison.arm))),
        by_task=_by_task(runs, tasks),
        missing=tuple(missing),
        notes=tuple(notes),
    )


def _in_order(arms: Sequence[str]) -> tuple[str, ...]:
    """Methods as first named; of each the dense arms first, then the others by how they choose and how many."""
    names = {arm: ArmName.parse(arm) for arm in dict.fromkeys(arms)}
    methods = list(dict.fromkeys(name.method for name in names.values()))
    suffixes = list(dict.fromkeys(["", *SELECTIONS, *(name.suffix for name in names.values())]))

    def place(arm: str) -> tuple[int, int, float]:
        name = names[arm]
        return methods.index(name.method), suffixes.index(name.suffix), _size(name.budget)

    return tuple(sorted(names, key=place))


def _size(budget: str) -> float:
    try:
        return float(budget.removeprefix("top"))
    except ValueError:  # none: all of the pool, or one of another version
        return math.inf


def _score(runs: Sequence[RunRecord], missing: Sequence[tuple[str, str, int]], arm: str, task: str) -> Score:
    mine = [run for run in runs if (run.arm, run.task) == (arm, task)]
    values = tuple(run.value for run in mine if finished(run) and run.value is not None)
    interval = mean_interval(values)
    absent = sum((name, where) == (arm, task) for where, name, _ in missing)
    return Score(interval.mean, interval.low, interval.high, values, len(mine) - len(values), absent)


def _average(scores: Sequence[Score]) -> Score:
    """The mean of the task means, where every task has one; its interval where every task has enough seeds."""
    failed, missing = sum(score.n_failed for score in scores), sum(score.n_missing for score in scores)
    means = tuple(score.mean for score in scores if score.mean is not None)
    if len(means) < len(scores):
        return Score(None, None, None, means, failed, missing)
    enough = all(len(score.values) >= FEWEST_FOR_INTERVAL for score in scores)
    spread = any(max(score.values) - min(score.values) >= TIE for score in scores)
    low, high = stratified_interval([score.values for score in scores]) if enough and spread else (None, None)
    return Score(fmean(means), low, high, means, failed, missing)


def _by_task(runs: Sequence[RunRecord], tasks: Sequence[str]) -> dict[tuple[str, str], Comparison]:
    """Each arm on each task alone; p-values are corrected over all of them, so that a mark means as much anywhere."""
    compared = [(task, each) for task in tasks for each in compare([run for run in runs if run.task == task])]
    corrected = iter(holm([each.p for _, each in compared if each.p is not None]))
    return {(each.arm, task): _with_p(each, None if each.p is None else next(corrected)) for task, each in compared}


def _with_p(comparison: Comparison, p: float | None) -> Comparison:
    lost = p is not None and p > ALPHA and comparison.verdict in ("better", "worse")
    return replace(comparison, p_corrected=p, verdict="no difference shown" if lost else comparison.verdict)
