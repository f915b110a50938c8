"""Which arm beats which over seeds and tasks: paired differences, judged together. Pure functions of run records.

A pair is one task and one seed that both arms finished under one setting. Every task has the same weight, however many
seeds it has, and counts once, however often its folder was copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from fish_tuning.errors import ConfigurationError, did_you_mean
from fish_tuning.experiments.compare.paired import TIE, Decision, Estimate, estimate, holm
from fish_tuning.experiments.compare.pairs import Pairs, paired, unique_runs
from fish_tuning.experiments.compare.summaries import FEWEST_FOR_INTERVAL
from fish_tuning.experiments.config.arm_names import CONTROLS, HEAD_ALONE, ArmName, baseline_of
from fish_tuning.experiments.records.run_record import RunRecord

Verdict = Literal[
    "better",
    "worse",
    "no difference shown",
    "too few seeds",
    "no spread",
    "all pairs equal",
    "settings differ",
    "no pairs",
]
SIGNIFICANT: tuple[Verdict, ...] = ("better", "worse")


@dataclass(frozen=True)
class Comparison:
    """`arm` minus `baseline`. The interval `low` to `high` is corrected for all comparisons made with this one.

    It leaves out zero if and only if `p_corrected` is at most 1 - confidence, and then alone the verdict is "better" or
    "worse". `raw_low` to `raw_high` and `p` are of this comparison alone.
    """

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
    raw_low: float | None
    raw_high: float | None
    p: float | None  # two-sided
    p_corrected: float | None
    wins: int
    ties: int
    losses: int
    verdict: Verdict
    reason: str | None  # why there is no interval, and which tasks are missing


def compare(
    runs: Sequence[RunRecord], pairs: Iterable[tuple[str, str]] | None = None, *, confidence: float = 0.95
) -> list[Comparison]:
    """Each arm against its baseline; intervals and p are corrected by Holm's method over all of them.

    Args:
        runs: of any number of experiments; failed runs and copies may be among them.
        pairs: names of arms and their baselines; by default those of `dense_pairs`.
        confidence: of the intervals; a difference is better or worse when the corrected p is at most 1 - confidence.

    Raises:
        ConfigurationError: an arm that has no run, or a confidence that is none.
    """
    _check_confidence(confidence)
    finished = unique_runs(runs)
    return _judged([_measured(*pair, paired(finished, *pair)) for pair in _known_pairs(runs, pairs)], 1 - confidence)


def compare_by_task(
    runs: Sequence[RunRecord], pairs: Iterable[tuple[str, str]] | None = None, *, confidence: float = 0.95
) -> list[tuple[str, Comparison]]:
    """As `compare`, on each task alone; corrected over all arms and tasks, so that each means as much.

    Of `pairs`, a task has those whose arms both have runs there.
    """
    _check_confidence(confidence)
    chosen = None if pairs is None else list(pairs)
    found = []
    for task in dict.fromkeys(run.task for run in runs):
        here = [run for run in runs if run.task == task]
        arms = {run.arm for run in here}
        known = None if chosen is None else [pair for pair in chosen if arms.issuperset(pair)]
        finished = unique_runs(here)
        found += [(task, _measured(*pair, paired(finished, *pair))) for pair in _known_pairs(here, known)]
    judged = _judged([each for _, each in found], 1 - confidence)
    return [(task, each) for (task, _), each in zip(found, judged, strict=True)]


def dense_pairs(runs: Iterable[RunRecord]) -> list[tuple[str, str]]:
    """Each masked arm with the dense arm of its method; one that keeps a given number of entries with every dense arm
    that trains as many, to a hundredth, and with that of its method where it has run.
    """
    kept: dict[str, set[int]] = {}
    for run in runs:  # a failed run does not tell
        kept.setdefault(run.arm, set()).add(run.kept_parameters or 0)
    found = []
    for arm in kept:
        name = ArmName.parse(arm)
        if name.count is None:
            found += [(arm, baseline_of(arm))] if arm != baseline_of(arm) else []
            continue
        dense = [other for other in kept if not ArmName.parse(other).suffix and other != HEAD_ALONE]
        found += [(arm, other) for other in dense if near(name.count, kept[other]) or other == baseline_of(arm)]
    return found


def near(count: int, others: Iterable[int]) -> bool:
    """Whether one of the counts is this one, to a hundredth: AdaLoRA ends with an entry a rank more than LoRA has."""
    return any(100 * abs(other - count) <= count for other in others)


def choice_pairs(arms: Iterable[str]) -> list[tuple[str, str]]:
    """Each arm that scores choose, with those of its method and budget chosen at random and in reverse.

    One whose name says its score (`lora-gain`) is set beside the method's own score (`lora-fish`), which the reverse
    belongs to, in the place of that.
    """
    known = list(dict.fromkeys(arms))
    names = [ArmName.parse(arm) for arm in known]
    chosen = [(name, name.selection) for name in names if name.selection is not None and name.selection.name == "fish"]
    own = [name for name, selection in chosen if selection.score is None]
    other = [name for name, selection in chosen if selection.score is not None]
    random, reverse = CONTROLS
    rivals = {random: [*own, *other], reverse: own, "fish": other}
    pairs = [(str(name), str(replace(name, suffix=rival))) for rival, those in rivals.items() for name in those]
    return [pair for pair in pairs if pair[1] in known]


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigurationError(f"compare: confidence is a share between 0 and 1, such as 0.95; it is {confidence}.")


def _known_pairs(runs: Sequence[RunRecord], pairs: Iterable[tuple[str, str]] | None) -> list[tuple[str, str]]:
    arms = list(dict.fromkeys(run.arm for run in runs))
    if pairs is None:
        return dense_pairs(runs)
    chosen = list(dict.fromkeys(pairs))
    for arm, baseline in chosen:
        for name in [name for name in (arm, baseline) if name not in arms]:
            hint = did_you_mean(name, arms)
            raise ConfigurationError(f"compare: no run of {name!r}; the arms are: {', '.join(arms)}.{hint}")
    return chosen


@dataclass(frozen=True)
class _Measured:
    """A comparison before it is judged with the others, and its estimate, where it has one."""

    comparison: Comparison
    estimate: Estimate | None


def _measured(arm: str, baseline: str, pairs: Pairs) -> _Measured:
    by_task = {} if pairs.conflicts else pairs.by_task
    differences = [d for values in by_task.values() for d in values]
    n_seeds = min(map(len, by_task.values()), default=0)
    found = estimate(list(by_task.values())) if n_seeds >= FEWEST_FOR_INTERVAL else None
    wins, losses = sum(d >= TIE for d in differences), sum(d <= -TIE for d in differences)
    comparison = Comparison(
        arm=arm,
        baseline=baseline,
        tasks=tuple(by_task),
        missing_tasks=tuple(pairs.missing),
        metric=next(iter(pairs.metrics)) if len(pairs.metrics) == 1 else "score",
        n=len(differences),
        n_seeds=n_seeds,
        mean_difference=fmean(map(fmean, by_task.values())) if by_task else None,
        low=None,
        high=None,
        raw_low=None,
        raw_high=None,
        p=None if found is None else found.p,
        p_corrected=None,
        wins=wins,
        ties=len(differences) - wins - losses,
        losses=losses,
        verdict="no pairs",
        reason=None,
    )
    verdict = _without_test(comparison, pairs)
    reason = " ".join(_reasons(comparison, verdict, pairs)) or None
    return _Measured(replace(comparison, verdict=verdict, reason=reason), found)


def _without_test(one: Comparison, pairs: Pairs) -> Verdict:
    """The verdict, as far as it needs no test."""
    verdict: Verdict = "no difference shown"
    if pairs.conflicts:
        verdict = "settings differ"
    elif not one.n:
        verdict = "no pairs"
    elif one.n == one.ties:
        verdict = "all pairs equal"
    elif one.n_seeds < FEWEST_FOR_INTERVAL:
        verdict = "too few seeds"
    elif one.p is None:
        verdict = "no spread"
    return verdict


def _judged(measured: Sequence[_Measured], alpha: float) -> list[Comparison]:
    """A family: all that have a p are corrected for each other."""
    family = [each for each in measured if each.estimate is not None]
    decisions = iter(holm([each.comparison.p or 0.0 for each in family], alpha))
    return [
        each.comparison if each.estimate is None else _decided(each.comparison, each.estimate, next(decisions), alpha)
        for each in measured
    ]


def _decided(one: Comparison, found: Estimate, decision: Decision, alpha: float) -> Comparison:
    low, high = found.interval(decision.level)
    # A bound that rounding puts on the other side of zero than the decision is put on zero's own side.
    if decision.significant:
        low, high = (max(low, 5e-324), high) if found.mean > 0 else (low, min(high, -5e-324))
    else:
        low, high = min(low, 0.0), max(high, 0.0)
    raw_low, raw_high = found.interval(alpha)
    verdict = one.verdict
    if verdict != "all pairs equal":
        verdict = ("better" if found.mean > 0 else "worse") if decision.significant else "no difference shown"
    return replace(
        one,
        low=low,
        high=high,
        raw_low=raw_low,
        raw_high=raw_high,
        p_corrected=decision.p_corrected,
        verdict=verdict,
    )


def _on(tasks: Sequence[str]) -> str:
    """Of an experiment alone, whose one task needs no name, nothing."""
    named = ", ".join(filter(None, tasks))
    return f" on {named}" if named else ""


def _reasons(one: Comparison, verdict: Verdict, pairs: Pairs) -> Iterator[str]:
    if pairs.conflicts:
        yield (
            f"Runs{_on(pairs.conflicts)} differ in more than their seeds and arms (model, data or settings), "
            "so they are no pairs or no further seeds of each other, and no verdict is given."
        )
    elif verdict == "no pairs":
        yield f"No seed finished in both {one.arm} and {one.baseline} of one experiment."
    elif one.missing_tasks:
        yield f"No pair in {', '.join(one.missing_tasks)}."
    if verdict == "too few seeds":
        seeds = "seed" if one.n_seeds == 1 else "seeds"
        seeds += "" if len(one.tasks) == 1 else " in the task that has the fewest"
        yield f"{one.n_seeds} {seeds}; at least {FEWEST_FOR_INTERVAL} are needed."
    elif verdict == "no spread":
        yield "Every seed gave the same difference, which says nothing about their spread."
