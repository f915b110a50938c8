"""Runs of one or more experiments joined: scores of every arm on every task, and what the comparisons say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from fish_tuning.experiments.compare.comparisons import Comparison, choice_pairs, compare, compare_by_task
from fish_tuning.experiments.compare.paired import estimate
from fish_tuning.experiments.compare.references import (
    constant_name,
    constant_of,
    fallen_note,
    nothing_learned,
    unlearned_note,
)
from fish_tuning.experiments.compare.summaries import FEWEST_FOR_INTERVAL, all_equal, mean_interval
from fish_tuning.experiments.config.arm_names import HEAD_ALONE, SELECTIONS, ArmName, baseline_of
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.report.page.columns import column_labels
from fish_tuning.experiments.report.page.load import Experiment, finished

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
    reason: str = ""  # why a mean has no interval


@dataclass(frozen=True)
class Family:
    """Comparisons that are corrected together: `overall` over all tasks, and apart from that `by_task`."""

    overall: tuple[Comparison, ...]
    by_task: dict[tuple[str, str, str], Comparison]  # arm, baseline, task; corrected over all of them


@dataclass(frozen=True)
class Results:
    """`tasks` are labels: a task, and with it the model or the experiment where one task alone would be ambiguous."""

    runs: tuple[RunRecord, ...]  # each with the label of its column as `task`; failed ones included
    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    metrics: dict[str, str]  # task -> metric
    scores: dict[tuple[str, str], Score]  # arm, task
    averages: dict[str, Score]  # empty when there is one task, or one task under several settings
    to_dense: Family  # each arm minus the dense arm of its method
    of_choice: Family  # each arm chosen by Fisher scores minus those of its budget chosen at random or in reverse
    missing: tuple[tuple[str, str, int], ...]  # task, arm, seed
    notes: tuple[str, ...]
    constants: dict[str, float]  # task -> the metric of always giving the same answer
    constant_name: str
    unlearned: dict[str, str]  # task that no arm learns -> what is said of it
    fallen: dict[str, str]  # task on which training fell apart with some seeds -> what is said of it

    @property
    def failed(self) -> list[RunRecord]:
        return [run for run in self.runs if not finished(run)]

    def of_arm(self, arm: str) -> list[RunRecord]:
        """The runs of an arm that finished."""
        return [run for run in self.runs if run.arm == arm and finished(run)]

    def parameters(self, arm: str) -> tuple[int, int] | None:
        """Fewest and most trainable parameters; tasks may differ by their heads."""
        return self.span(arm, "trainable_parameters")

    def span(self, arm: str, name: str) -> tuple[int, int] | None:
        """The least and the most of a count that the arm's records hold; None where one of them lacks it."""
        known = [getattr(run, name) for run in self.of_arm(arm)]
        return (min(known), max(known)) if known and None not in known else None

    def comparison(self, arm: str, task: str | None = None) -> Comparison | None:
        """An arm with its dense arm, over all tasks or on one; with the first, where there are several of its size."""
        if task is None or len(self.tasks) == 1:
            return next((each for each in self.to_dense.overall if each.arm == arm), None)
        here = {
            baseline: each
            for (mine, baseline, where), each in self.to_dense.by_task.items()
            if (mine, where) == (arm, task)
        }
        return here.get(baseline_of(arm)) or next(iter(here.values()), None)


def join_results(experiments: Sequence[Experiment]) -> Results:
    """Join the runs; see `column_labels` for which experiments share a column."""
    labels, notes = column_labels(experiments)
    unique: dict[tuple[str, str, int], RunRecord] = {}
    for label, run in ((labels[experiment.folder], run) for experiment in experiments for run in experiment.runs):
        key = label, run.arm, run.seed
        if key not in unique or finished(run):  # a run that failed in one folder may have finished in another
            unique[key] = replace(run, task=label)
    runs = [run if finished(run) else replace(run, error=run.error or NOT_A_NUMBER) for run in unique.values()]
    # Over all tasks, a task counts once, under its own name.
    original = [run for experiment in experiments for run in experiment.runs]
    of_task = {task: [run for run in runs if run.task == task] for task in dict.fromkeys(labels.values())}
    planned = [(labels[each.folder], arm, seed) for each in experiments for arm, seed in each.planned]
    missing = [key for key in dict.fromkeys(planned) if key not in unique]
    tasks = tuple(dict.fromkeys(labels.values()))
    arms = _in_order([*(arm for _, arm, _ in planned), *(run.arm for run in runs)])
    scores = {(arm, task): _score(runs, missing, arm, task) for arm in arms for task in tasks}
    averages = {}
    if len({run.task for each in experiments for run in each.runs}) < len(tasks):
        notes.append(
            "One task stands under several models or settings: there is no average over tasks, and no verdict over all "
            "of them; each column has its own."
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
        to_dense=_family(original, runs, arms, None),
        of_choice=_family(
            original, runs, arms, choice_pairs(arm for arm in arms if any(run.arm == arm for run in runs))
        ),
        missing=tuple(missing),
        notes=tuple(notes),
        constants={task: value for task, found in of_task.items() if (value := constant_of(found)) is not None},
        constant_name=constant_name(runs),
        unlearned={task: unlearned_note(task, found) for task, found in of_task.items() if nothing_learned(found)},
        fallen={task: note for task, found in of_task.items() if (note := fallen_note(task, found))},
    )


def _in_order(arms: Sequence[str]) -> tuple[str, ...]:
    """The head alone, then methods as first named: the dense arms, then the others by how they choose and how many."""
    names = {arm: ArmName.parse(arm) for arm in dict.fromkeys(arms)}
    methods = list(dict.fromkeys(name.method for name in names.values()))
    suffixes = list(dict.fromkeys(["", *SELECTIONS, *(name.suffix for name in names.values())]))

    def place(arm: str) -> tuple[int, int, float]:
        name = names[arm]
        first = -1 if arm == HEAD_ALONE else methods.index(name.method)
        return first, suffixes.index(name.suffix), _size(name.budget)

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
    failed, absent = len(mine) - len(values), sum((name, where) == (arm, task) for where, name, _ in missing)
    if len(values) < FEWEST_FOR_INTERVAL:
        seeds = "1 seed" if len(values) == 1 else f"{len(values)} seeds"
        return Score(interval.mean, None, None, values, failed, absent, f"{seeds}, no interval")
    if all_equal(values):
        return Score(interval.mean, None, None, values, failed, absent, "all seeds equal")
    return Score(interval.mean, interval.low, interval.high, values, failed, absent)


def _average(scores: Sequence[Score]) -> Score:
    """The mean of the task means, where every task has one; its interval where every task has enough seeds."""
    failed, missing = sum(score.n_failed for score in scores), sum(score.n_missing for score in scores)
    means = tuple(score.mean for score in scores if score.mean is not None)
    if len(means) < len(scores):
        return Score(None, None, None, means, failed, missing)
    if (fewest := min(len(score.values) for score in scores)) < FEWEST_FOR_INTERVAL:
        reason = f"a task has {fewest} {'seed' if fewest == 1 else 'seeds'}, no interval"
        return Score(fmean(means), None, None, means, failed, missing, reason)
    if all(all_equal(score.values) for score in scores):
        return Score(fmean(means), None, None, means, failed, missing, "all seeds equal")
    found = estimate([score.values for score in scores])
    low, high = (None, None) if found is None else found.interval(0.05)
    return Score(fmean(means), low, high, means, failed, missing)


def _family(
    original: Sequence[RunRecord],
    columns: Sequence[RunRecord],
    arms: Sequence[str],
    pairs: Sequence[tuple[str, str]] | None,
) -> Family:
    """Of the runs under their own tasks, and of those of each column."""
    by_task = {(each.arm, each.baseline, task): each for task, each in compare_by_task(columns, pairs)}
    overall = compare(original, pairs)
    return Family(tuple(overall if pairs else sorted(overall, key=lambda each: arms.index(each.arm))), by_task)
