"""The pictures of the page: of which results, how large, and with what caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup

from fish_tuning.experiments.config.arm_names import ArmName
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.report.look import Look
from fish_tuning.experiments.report.page import words
from fish_tuning.experiments.report.page.costs import Cost
from fish_tuning.experiments.report.page.differences import spoken_difference
from fish_tuning.experiments.report.page.results import Family, Results, Score
from fish_tuning.experiments.report.pictures.canvas import Picture
from fish_tuning.experiments.report.pictures.curves import curves_picture, mean_curve
from fish_tuning.experiments.report.pictures.heat import heat_picture, largest_share
from fish_tuning.experiments.report.pictures.marks import swatch
from fish_tuning.experiments.report.pictures.rows import (
    Difference,
    Seconds,
    Words,
    differences_picture,
    seconds_picture,
)
from fish_tuning.experiments.report.pictures.score_size import Point, score_size_picture
from fish_tuning.experiments.report.pictures.sizes import arm_sizes
from fish_tuning.experiments.report.pictures.svg import svg
from fish_tuning.experiments.report.shares import Shares, factor_shares, mean_shares

WIDE, NARROW = 700, 330
TO_DENSE = Words("Difference to the dense arm", "dense arm better", "this arm better")
OF_CHOICE = Words("Difference to other choices at the same budget", "other choice better", "the arm better")
_COUNTED = {"kept": "kept entries, without the head", "trainable": "trainable parameters, head included"}


@dataclass(frozen=True)
class Shown:
    """A picture in the page: for one width, or for two of which the page shows the one that fits."""

    title: str
    wide: Markup
    narrow: Markup | None = None
    intervals: str = ""  # what its marks are, for the caption


@dataclass(frozen=True)
class HeatMaps:
    """Of the arms of one budget, on one scale that ends with the share `top`."""

    budget: str
    top: float
    shown: list[Shown]


def legend(look: Mapping[str, Look]) -> list[tuple[str, Markup]]:
    """Each mark once; arms that only differ by their budget share one, as `lora-fish@0.1, @0.5`."""
    arms: dict[Look, list[str]] = {}
    for arm, each in look.items():
        arms.setdefault(each, []).append(arm)
    return [
        (
            ", ".join([first, *(f"@{name.budget}" if (name := ArmName.parse(arm)).budget else arm for arm in others)]),
            svg(swatch(each), f"swatch{number}"),
        )
        for number, (each, (first, *others)) in enumerate(arms.items())
    ]


def score_sizes(results: Results, look: Mapping[str, Look]) -> list[Shown]:
    """Of the average and of each task; the first is drawn large where it is the average, or alone."""
    named = [
        (
            task,
            results.metrics.get(task, "metric"),
            {arm: results.scores[arm, task] for arm in results.arms},
            [run for run in _finished(results) if run.task == task],
        )
        for task in results.tasks
    ]
    averaged = any(score.mean is not None for score in results.averages.values())
    if averaged:
        named.insert(0, ("average over tasks", "mean of the metrics", results.averages, _finished(results)))
    shown: list[Shown] = []
    for number, (name, metric, scores, runs) in enumerate(named):
        of_arms, counted = arm_sizes(runs)
        points = _points(scores, of_arms)
        if not points:
            continue
        title = f"{name}: {metric.replace('_', ' ')}"
        draw = partial(score_size_picture, points, look, title, _COUNTED[counted])
        large = number == 0 and (averaged or len(named) == 1)
        sizes = ((WIDE, 360), (NARROW, 320)) if large else ((NARROW, 270),)
        shown.append(_shown(f"size{number}", [draw(*size) for size in sizes]))
    return shown


def differences(family: Family, look: Mapping[str, Look], title: Words, name: str) -> Shown | None:
    rows = [
        Difference(
            words.row_name(each),
            each.mean_difference,
            each.low,
            each.high,
            look[each.arm],
            f"{each.arm} minus {each.baseline}: {spoken_difference(each)}, {each.verdict}",
        )
        for each in family.overall
        if each.mean_difference is not None
    ]
    return _shown(name, [differences_picture(rows, title, width) for width in (WIDE, NARROW)]) if rows else None


def curves(results: Results, look: Mapping[str, Look]) -> list[Shown]:
    """Of each task; a single one is drawn large."""
    shown: list[Shown] = []
    for number, task in enumerate(results.tasks):
        mine = {arm: [run for run in results.of_arm(arm) if run.task == task] for arm in results.arms}
        drawn = {arm: curve for arm, runs in mine.items() if (curve := mean_curve(runs))}
        if drawn:
            draw = partial(curves_picture, drawn, {arm: look[arm] for arm in drawn}, f"{task}: training loss")
            sizes = ((WIDE, 320), (NARROW, 260)) if len(results.tasks) == 1 else ((NARROW, 260),)
            shown.append(_shown(f"loss{number}", [draw(*size) for size in sizes], task))
    return shown


def heat_maps(results: Results) -> list[HeatMaps]:
    """By budget: next to a large one all else would be dark."""
    budgets: dict[str, dict[str, Shares]] = {}
    for arm in results.arms:
        if shares := mean_shares(results.of_arm(arm)):
            budgets.setdefault(ArmName.parse(arm).budget, {})[arm] = shares
    found: list[HeatMaps] = []
    for budget, maps in budgets.items():
        top, first = largest_share(maps), sum(len(each.shown) for each in found)
        drawn = [heat_picture({arm: shares}, top, titles=False) for arm, shares in maps.items()]
        shown = [
            _shown(f"heat{number}", [each], arm)
            for number, (arm, each) in enumerate(zip(maps, drawn, strict=True), first)
        ]
        found.append(HeatMaps(budget, top, shown))
    return found


def factors(results: Results) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    found = {arm: factor_shares(share for run in results.of_arm(arm) for share in run.kept) for arm in results.arms}
    return [(arm, parts) for arm, parts in found.items() if {"A", "B"} <= parts.keys()]


def seconds(measured: Sequence[Cost]) -> Shown | None:
    rows = [Seconds(cost.arm, cost.scoring or 0.0, cost.training) for cost in measured if cost.training is not None]
    drawn = [seconds_picture(rows, "Time of one run", width) for width in (WIDE, NARROW)] if rows else []
    return _shown("seconds", drawn) if drawn else None


def _finished(results: Results) -> list[RunRecord]:
    return [run for arm in results.arms for run in results.of_arm(arm)]


def _points(scores: Mapping[str, Score], sizes: Mapping[str, int]) -> list[Point]:
    return [
        Point(arm, sizes[arm], score.mean, score.low, score.high)
        for arm, score in scores.items()
        if arm in sizes and score.mean is not None
    ]


def _shown(name: str, pictures: Sequence[Picture], title: str = "") -> Shown:
    """Of a picture, or of a wide and a narrow one."""
    wide, *narrow = (svg(picture, f"{name}-{number}") for number, picture in enumerate(pictures))
    return Shown(title or pictures[0].title, wide, narrow[0] if narrow else None, pictures[0].intervals)
