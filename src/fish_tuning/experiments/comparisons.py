"""Which arm beats which over seeds and tasks: paired differences, tests and corrections. Pure functions of run records.

A pair is one task and one seed that both arms finished. Every task has the same weight, however many seeds it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, variance
from typing import Literal, NamedTuple

from fish_tuning.errors import ConfigurationError, did_you_mean
from fish_tuning.experiments.records import RunRecord
from fish_tuning.experiments.statistics import FEWEST_FOR_INTERVAL, baseline_of

TIE = 1e-12  # differences below this are rounding
EXACT_PAIRS = 20  # up to here all sign flips are enumerated: half a million sums
MONTE_CARLO_DRAWS = 19_999
EXACT = "exact sign-flip permutation"
MONTE_CARLO = f"Monte Carlo sign-flip permutation, {MONTE_CARLO_DRAWS:,} draws"

Verdict = Literal["better", "worse", "no difference shown", "too few seeds", "all pairs equal", "no pairs"]


@dataclass(frozen=True)
class Comparison:
    """`arm` minus `baseline`. The interval is of this comparison alone; the verdict follows `p_corrected`."""

    arm: str
    baseline: str
    tasks: tuple[str, ...]  # with at least one pair, sorted
    missing_tasks: tuple[str, ...]  # where only one of the two ran, or no seed finished in both
    metric: str  # "score" when the tasks have different metrics
    n: int  # pairs
    n_seeds: int  # pairs of the task that has the fewest
    mean_difference: float | None
    low: float | None
    high: float | None
    p: float | None  # two-sided
    p_corrected: float | None  # over all comparisons returned with this one
    p_method: str | None
    wins: int
    ties: int
    losses: int
    verdict: Verdict
    reason: str | None  # why there is no interval, why significance is out of reach, which tasks are missing


@dataclass(frozen=True)
class TaskMean:
    """One arm on one task over its finished seeds; `mean` is None when there are none."""

    task: str
    arm: str
    metric: str | None
    mean: float | None
    n_ok: int
    n_failed: int


@dataclass(frozen=True)
class TaskTable:
    """Tasks and arms in the order in which they first appear; `means[task, arm]` has every combination."""

    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    means: dict[tuple[str, str], TaskMean]
    averages: dict[str, float | None]  # of an arm's task means, each with equal weight; None when tasks are missing
    missing_tasks: dict[str, tuple[str, ...]]  # those in which an arm has no finished seed


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
    `seed` matters only where there are too many pairs to enumerate the sign flips. A difference is called better or
    worse when the corrected p is at most `1 - confidence`. An interval may leave out zero without that.

    Raises ConfigurationError for arms that have no run, and for runs that contradict each other.
    """
    if not 0 < confidence < 1:
        raise ConfigurationError(f"compare: confidence is a share between 0 and 1, such as 0.95; it is {confidence}.")
    scores = _finished(runs)
    compared = [
        _uncorrected(arm, baseline, *_pair(runs, scores, arm, baseline), confidence, seed)
        for arm, baseline in _known_pairs(runs, pairs)
    ]
    return [_judged(one, [other for other in compared if other is not one], 1 - confidence) for one in compared]


def task_table(runs: Sequence[RunRecord]) -> TaskTable:
    """The mean of every arm on every task, and the average of each arm that finished a seed of all tasks."""
    tasks = tuple(dict.fromkeys(run.task for run in runs))
    arms = tuple(dict.fromkeys(label(run) for run in runs))
    scores = _finished(runs)
    means = {(task, arm): _task_mean(runs, scores, task, arm) for task in tasks for arm in arms}
    known = {arm: [mean for task in tasks if (mean := means[task, arm].mean) is not None] for arm in arms}
    averages = {arm: fmean(values) if len(values) == len(tasks) else None for arm, values in known.items()}
    missing = {arm: tuple(task for task in tasks if means[task, arm].mean is None) for arm in arms}
    return TaskTable(tasks, arms, means, averages, missing)


def stratified_interval(by_task: Sequence[Sequence[float]], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the mean of the task means: Student's t, degrees of freedom by Satterthwaite.

    With K tasks of n_k values and variance s_k^2, a_k = s_k^2 / n_k: the standard error is sqrt(sum a_k) / K, with
    (sum a_k)^2 / sum(a_k^2 / (n_k - 1)) degrees of freedom (Satterthwaite 1946, Welch 1947). For one task this is
    `mean_interval`. Needs two values a task, and one task whose values differ.

    Not a bootstrap: from so few seeds its intervals are far too narrow or, studentized, endless. How many of
    10,000 (one task) and 6,000 (six tasks) simulated 95 % intervals held the true mean, in percent, for normal
    differences, with six tasks also for standard deviations up to ten times apart ("uneven"):

    | tasks, seeds | percentile | BCa | bootstrap-t | this |
    |---|---:|---:|---:|---:|
    | 1, 3 | 75.7 | 73.2 | 99.8, most of them endless | 94.7 |
    | 1, 5 | 83.9 | 83.7 | 95.1, a third wider | 95.3 |
    | 6, 3 | 85.1 (uneven 82.1) | 84.8 (82.0) | 96.5 (96.5) | 96.0 (95.4) |
    | 6, 5 | 90.0 (uneven 88.4) | 90.1 (88.2) | 95.2 (95.2) | 95.2 (95.2) |

    This falls to 87 to 94 for exponential differences, or where one seed in twenty collapses.
    """
    from scipy.stats import t

    shares = [variance(values) / len(values) for values in by_task]
    degrees = sum(shares) ** 2 / sum(a * a / (len(values) - 1) for a, values in zip(shares, by_task, strict=True))
    mean = fmean(fmean(values) for values in by_task)
    half = float(t.ppf((1 + confidence) / 2, degrees)) * math.sqrt(sum(shares)) / len(by_task)
    return mean - half, mean + half


def sign_flip_p(by_task: Sequence[Sequence[float]], *, seed: int = 0) -> float:
    """Two-sided p of the mean of the task means when every paired difference may as well have the other sign.

    Fisher's randomization test (1935): the share of all sign patterns with a mean at least as far from zero. Exact up
    to `EXACT_PAIRS` differences that are no ties; beyond, (hits + 1) / (draws + 1) (Phipson and Smyth 2010).
    """
    import numpy as np

    terms = np.array([d / len(values) for values in by_task for d in values if abs(d) >= TIE])
    reached = abs(terms.sum()) - 1e-12 * np.abs(terms).sum()  # sums that are equal but for rounding count as hits
    if len(terms) > EXACT_PAIRS:
        flips = np.random.default_rng(seed).integers(0, 2, (MONTE_CARLO_DRAWS, len(terms)), dtype=np.int8)
        hits = int((np.abs(terms.sum() - 2 * flips @ terms) >= reached).sum())
        return (hits + 1) / (MONTE_CARLO_DRAWS + 1)
    sums = terms[:1].sum(keepdims=True)  # the first sign stays: flipping all of them changes no distance
    for term in terms[1:]:
        sums = np.concatenate([sums + term, sums - term])
    return float((np.abs(sums) >= reached).mean())


def holm(p: Sequence[float]) -> list[float]:
    """Step-down p-values that bound the chance of any false finding in the family (Holm 1979), in the given order."""
    corrected, highest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = highest
    return corrected


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
    arm: str, baseline: str, by_task: Differences, metrics: set[str], confidence: float, seed: int
) -> Comparison:
    filled = [values for values in by_task.values() if values]
    differences = [d for values in filled for d in values]
    n_seeds = min(map(len, filled), default=0)
    varied = any(max(values) - min(values) >= TIE for values in filled)
    interval = stratified_interval(filled, confidence) if n_seeds >= FEWEST_FOR_INTERVAL and varied else (None, None)
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
        p=sign_flip_p(filled, seed=seed) if filled else None,
        p_corrected=None,
        p_method=None if not filled else EXACT if wins + losses <= EXACT_PAIRS else MONTE_CARLO,
        wins=wins,
        ties=len(differences) - wins - losses,
        losses=losses,
        verdict="no pairs",
        reason=f"No seed finished in both {arm} and {baseline}.",
    )


def _judged(one: Comparison, others: Sequence[Comparison], alpha: float) -> Comparison:
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


def _task_mean(runs: Sequence[RunRecord], scores: Scores, task: str, arm: str) -> TaskMean:
    mine = [run for run in runs if (run.task, label(run)) == (task, arm)]
    seeds = {run.seed for run in mine}
    values = [scores[arm, task, seed].value for seed in sorted(seeds) if (arm, task, seed) in scores]
    mean = fmean(values) if values else None
    return TaskMean(task, arm, mine[0].metric if mine else None, mean, len(values), len(seeds) - len(values))
