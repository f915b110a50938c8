"""Which arm beats which over seeds and tasks: paired differences, tests and corrections. Pure functions of run records.

A pair is one task and one seed that both arms finished. Every task has the same weight, however many seeds it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal, NamedTuple

from fish_tuning.errors import ConfigurationError, did_you_mean
from fish_tuning.experiments.compare.paired_tests import (
    EXACT,
    EXACT_PAIRS,
    MONTE_CARLO,
    TIE,
    bootstrap_interval,
    holm,
    sign_flip_p,
    stratified_interval,
)
from fish_tuning.experiments.compare.summaries import FEWEST_FOR_INTERVAL, baseline_of
from fish_tuning.experiments.config.arm_names import CONTROLS, ArmName
from fish_tuning.experiments.records.run_record import RunRecord

Verdict = Literal["better", "worse", "no difference shown", "too few seeds", "all pairs equal", "no pairs"]


@dataclass(frozen=True)
class Comparison:
    """`arm` minus `baseline`. The intervals are of this comparison alone; the verdict follows `p_corrected`."""

    arm: str
    baseline: str
    tasks: tuple[str, ...]  # with at least one pair, sorted
    missing_tasks: tuple[str, ...]  # where only one of the two ran, or no seed finished in both
    metric: str  # "score" when the tasks have different metrics
    n: int  # pairs
    n_seeds: int  # pairs of the task that has the fewest
    mean_difference: float | None
    low: float | None  # Student's t over tasks: the interval to go by
    high: float | None
    bootstrap_low: float | None  # too narrow where seeds are few: see `stratified_interval`
    bootstrap_high: float | None
    p: float | None  # two-sided
    p_corrected: float | None  # over all comparisons returned with this one
    p_method: str | None
    wins: int
    ties: int
    losses: int
    verdict: Verdict
    reason: str | None  # why there is no interval, why significance is out of reach, which tasks are missing


def label(run: RunRecord) -> str:
    """What a run is compared as."""
    return run.arm


def compare(
    runs: Sequence[RunRecord],
    pairs: Iterable[tuple[str, str]] | None = None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Comparison]:
    """Each arm against its baseline; p-values are corrected by Holm's method over all of them.

    `pairs` names the arms and their baselines; the default is every other arm against the dense arm of its method.
    `seed` matters for the bootstrap, and for p where there are too many pairs to enumerate the sign flips. A difference
    is better or worse when the corrected p is at most `1 - confidence`. An interval may leave out zero without that.

    Raises ConfigurationError for arms that have no run, and for runs that contradict each other.
    """
    return _judged(_uncorrected(runs, pairs, confidence, seed), confidence)


def compare_by_task(
    runs: Sequence[RunRecord],
    pairs: Iterable[tuple[str, str]] | None = None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[tuple[str, Comparison]]:
    """As `compare`, on each task alone; p-values are corrected over all arms and tasks, so that each means as much.

    Of `pairs`, a task has those whose arms both have runs there.
    """
    chosen = None if pairs is None else list(pairs)
    found = []
    for task in dict.fromkeys(run.task for run in runs):
        here = [run for run in runs if run.task == task]
        arms = {label(run) for run in here}
        known = None if chosen is None else [pair for pair in chosen if arms.issuperset(pair)]
        found += [(task, each) for each in _uncorrected(here, known, confidence, seed)]
    judged = _judged([each for _, each in found], confidence)
    return [(task, each) for (task, _), each in zip(found, judged, strict=True)]


def choice_pairs(arms: Iterable[str]) -> list[tuple[str, str]]:
    """Each arm that Fisher scores choose, with those of its method and budget chosen at random and in reverse."""
    known = list(dict.fromkeys(arms))
    names = [ArmName.parse(arm) for arm in known]
    chosen = [name for name in names if name.selection is not None and name.selection.method == "fish"]
    pairs = [(str(name), str(replace(name, suffix=control))) for control in CONTROLS for name in chosen]
    return [pair for pair in pairs if pair[1] in known]


class Score(NamedTuple):
    value: float
    metric: str
    model: str


Scores = dict[tuple[str, str, int], Score]  # by arm, task and seed
Differences = dict[str, list[float]]  # by task


def _finished(runs: Sequence[RunRecord]) -> Scores:
    """The finished runs, each once, however often it is listed."""
    scores: Scores = {}
    for run in runs:
        if run.status != "ok" or run.value is None or not math.isfinite(run.value):
            continue
        score = Score(run.value, run.metric, run.model)
        if (other := scores.setdefault((label(run), run.task, run.seed), score)) != score:
            raise ConfigurationError(
                f"{label(run)}, task {run.task!r}, seed {run.seed} finished twice, with {other} and with {score}: "
                "give the runs of one experiment for each task, and one model at a time."
            )
    return scores


def _known_pairs(runs: Sequence[RunRecord], pairs: Iterable[tuple[str, str]] | None) -> list[tuple[str, str]]:
    arms = list(dict.fromkeys(label(run) for run in runs))
    if pairs is None:
        return [(arm, baseline_of(arm)) for arm in arms if arm != baseline_of(arm)]
    chosen = list(dict.fromkeys(pairs))
    for arm, baseline in chosen:
        for name in [name for name in (arm, baseline) if name not in arms]:
            hint = did_you_mean(name, arms)
            raise ConfigurationError(f"compare: no run of {name!r}; the arms are: {', '.join(arms)}.{hint}")
    return chosen


def _pair(runs: Sequence[RunRecord], scores: Scores, arm: str, baseline: str) -> tuple[Differences, set[str]]:
    """The differences on each task where either arm ran, by task and by seed, and their metrics."""
    by_task: Differences = {task: [] for task in sorted({r.task for r in runs if label(r) in (arm, baseline)})}
    metrics = set()
    for (name, task, seed), ours in sorted(scores.items(), key=lambda item: item[0]):
        theirs = scores.get((baseline, task, seed))
        if name != arm or theirs is None:
            continue
        if (ours.metric, ours.model) != (theirs.metric, theirs.model):
            raise ConfigurationError(
                f"compare: on task {task!r}, seed {seed}, {arm} has {ours} and {baseline} has {theirs}; "
                "a pair needs the same metric and the same model."
            )
        by_task[task].append(ours.value - theirs.value)
        metrics.add(ours.metric)
    return by_task, metrics


def _uncorrected(
    runs: Sequence[RunRecord], pairs: Iterable[tuple[str, str]] | None, confidence: float, seed: int
) -> list[Comparison]:
    if not 0 < confidence < 1:
        raise ConfigurationError(f"compare: confidence is a share between 0 and 1, such as 0.95; it is {confidence}.")
    scores = _finished(runs)
    return [
        _measured(arm, baseline, *_pair(runs, scores, arm, baseline), confidence, seed)
        for arm, baseline in _known_pairs(runs, pairs)
    ]


def _measured(
    arm: str, baseline: str, by_task: Differences, metrics: set[str], confidence: float, seed: int
) -> Comparison:
    filled = [values for values in by_task.values() if values]
    differences = [d for values in filled for d in values]
    n_seeds = min(map(len, filled), default=0)
    varied = any(max(values) - min(values) >= TIE for values in filled)
    enough = n_seeds >= FEWEST_FOR_INTERVAL and varied
    interval = stratified_interval(filled, confidence) if enough else (None, None)
    bootstrap = bootstrap_interval(filled, confidence, seed=seed) if enough else (None, None)
    wins, losses = sum(d >= TIE for d in differences), sum(d <= -TIE for d in differences)
    return Comparison(
        arm=arm,
        baseline=baseline,
        tasks=tuple(task for task, values in by_task.items() if values),
        missing_tasks=tuple(task for task, values in by_task.items() if not values),
        metric=next(iter(metrics)) if len(metrics) == 1 else "score",
        n=len(differences),
        n_seeds=n_seeds,
        mean_difference=fmean(map(fmean, filled)) if filled else None,
        low=interval[0],
        high=interval[1],
        bootstrap_low=bootstrap[0],
        bootstrap_high=bootstrap[1],
        p=sign_flip_p(filled, seed=seed) if filled else None,
        p_corrected=None,
        p_method=None if not filled else EXACT if wins + losses <= EXACT_PAIRS else MONTE_CARLO,
        wins=wins,
        ties=len(differences) - wins - losses,
        losses=losses,
        verdict="no pairs",
        reason=f"No seed finished in both {arm} and {baseline}.",
    )


def _judged(compared: Sequence[Comparison], confidence: float) -> list[Comparison]:
    """A family: all p-values are corrected for each other."""
    return [_verdict(one, [other for other in compared if other is not one], 1 - confidence) for one in compared]


def _verdict(one: Comparison, others: Sequence[Comparison], alpha: float) -> Comparison:
    if one.p is None or one.mean_difference is None:
        return one
    family = [other.p for other in others if other.p is not None]
    corrected = holm([one.p, *family])[0]
    possible = 2.0 ** (1 - one.wins - one.losses)  # the p of differences that all have the same sign
    lowest = holm([possible, *family])[0]
    reason = " ".join(_reasons(one, possible, lowest, len(family) + 1, alpha)) or None
    if one.n == one.ties:
        verdict: Verdict = "all pairs equal"
    elif one.n_seeds < FEWEST_FOR_INTERVAL or lowest > alpha:
        verdict = "too few seeds"
    elif corrected > alpha:
        verdict = "no difference shown"
    else:
        verdict = "better" if one.mean_difference > 0 else "worse"
    return replace(one, p_corrected=corrected, verdict=verdict, reason=reason)


def _reasons(one: Comparison, possible: float, lowest: float, tests: int, alpha: float) -> Iterable[str]:
    if one.missing_tasks:
        yield f"No pair in {', '.join(one.missing_tasks)}."
    if one.n_seeds < FEWEST_FOR_INTERVAL:
        seeds = "seed" if one.n_seeds == 1 else "seeds"
        seeds += "" if len(one.tasks) == 1 else " in the task that has the fewest"
        yield f"{one.n_seeds} {seeds}; at least {FEWEST_FOR_INTERVAL} are needed."
    elif one.low is None:
        yield "Every seed gave the same difference, which says nothing about their spread."
    if one.n > one.ties and lowest > alpha:
        pairs = f"{one.n - one.ties} {'untied ' if one.ties else ''}{'pair' if one.n - one.ties == 1 else 'pairs'}"
        corrected = f", {lowest:.3g} after correction for {tests} comparisons" if lowest > possible else ""
        yield f"{pairs} cannot be significant: the smallest p is {possible:.3g}{corrected}."
