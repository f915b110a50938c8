"""The metric of every arm against what it trains, on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from fish_tuning.experiments.config.arm_names import ArmName
from fish_tuning.experiments.report.page.marks import Look, mark
from fish_tuning.experiments.report.page.results import Score
from fish_tuning.experiments.report.page.svg import (
    Scale,
    element,
    line,
    linear,
    log_ticks,
    logarithmic,
    padded,
    picture,
    text,
    tick_text,
    ticks,
)

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 44


class Point(NamedTuple):
    arm: str
    parameters: int
    score: Score


def scatter(
    points: Sequence[Point], look: Mapping[str, Look], title: str, metric: str, width: int, height: int = 300
) -> Markup:
    """A mark for the mean of each arm with its interval, and a line through one arm's budgets.

    Arms that train the same number stand side by side, which the axis cannot show otherwise.
    """
    drawn = [point for point in points if point.score.mean is not None]
    sizes = [point.parameters for point in drawn]
    air = 2.0 if max(sizes) / min(sizes) < 1.2 else 1.35
    low, high = min(sizes) / air, max(sizes) * air
    across = logarithmic(low, high, _LEFT, width - _RIGHT)
    bottom, top = padded([bound for point in drawn for bound in _bounds(point.score)])
    up = linear(bottom, top, height - _BOTTOM, _TOP)
    places = _side_by_side([across(point.parameters) for point in drawn], width)
    x = {point.arm: place for point, place in zip(drawn, places, strict=True)}
    return picture(
        width,
        height,
        title,
        "; ".join(f"{point.arm}: {point.parameters:,} trainable parameters, {_spoken(point.score)}" for point in drawn),
        *(_row(up(tick), tick_text(tick), width) for tick in ticks(bottom, top)),
        *(_column(across(tick), tick_text(tick), height) for tick in log_ticks(low, high, width // 70)),
        line(_LEFT, height - _BOTTOM, width - _RIGHT, height - _BOTTOM, class_="axis"),
        text((_LEFT + width - _RIGHT) / 2, height - 8, "trainable parameters (log scale)", "middle", "label"),
        *_links(drawn, x, up, look),
        *(_arm(point, x[point.arm], up, look[point.arm]) for point in drawn),
        class_="scatter",
    )


def _bounds(score: Score) -> list[float]:
    return [value for value in (score.low, score.mean, score.high) if value is not None]


def _spoken(score: Score) -> str:
    interval = "" if score.low is None or score.high is None else f", interval {score.low:.3f} to {score.high:.3f}"
    return f"{score.mean:.3f}{interval}"


def _side_by_side(places: Sequence[float], width: int) -> list[float]:
    """Places closer than a mark is wide are spread around their middle; what then collides is spread together."""
    gap = min(13.0 if width > 400 else 9.0, (width - _LEFT - _RIGHT - 20) / len(places))
    groups: list[list[int]] = []
    for index in sorted(range(len(places)), key=lambda index: places[index]):
        groups.append([index])
        while len(groups) > 1 and _left(groups[-1], places, gap, width) < _right(groups[-2], places, gap, width) + gap:
            last = groups.pop()
            groups[-1] += last
    moved = list(places)
    for group in groups:
        start = _left(group, places, gap, width)
        for number, index in enumerate(sorted(group)):
            moved[index] = start + gap * number
    return moved


def _left(group: Sequence[int], places: Sequence[float], gap: float, width: int) -> float:
    """Where the first of a group stands, with all of it inside the picture."""
    span = gap * (len(group) - 1)
    middle = sum(places[index] for index in group) / len(group)
    return min(max(middle - span / 2, _LEFT + 8), width - _RIGHT - 8 - span)


def _right(group: Sequence[int], places: Sequence[float], gap: float, width: int) -> float:
    return _left(group, places, gap, width) + gap * (len(group) - 1)


def _row(y: float, words: str, width: int) -> Markup:
    return line(_LEFT, y, width - _RIGHT, y, class_="grid") + text(_LEFT - 6, y + 4, words, "end")


def _column(x: float, words: str, height: int) -> Markup:
    base = height - _BOTTOM
    return line(x, base, x, base + 4, class_="axis") + text(x, base + 17, words, "middle")


def _arm(point: Point, x: float, up: Scale, look: Look) -> Markup:
    score = point.score
    whisker = Markup()
    if score.low is not None and score.high is not None:
        y1, y2 = up(score.low), up(score.high)
        ends = "".join(f"M{x - 4:.1f},{y:.1f}h8" for y in (y1, y2))
        whisker = element("path", d=f"M{x:.1f},{y1:.1f}V{y2:.1f}{ends}", class_=f"whisker {look.css}")
    told = element("title", f"{point.arm}: {_spoken(score)}")
    return element("g", told, whisker, mark(x, up(score.mean or 0.0), look))


def _links(points: Sequence[Point], x: Mapping[str, float], up: Scale, look: Mapping[str, Look]) -> list[Markup]:
    """Lines through the budgets of one arm."""
    series: dict[str, list[Point]] = {}
    for point in points:
        name = ArmName.parse(point.arm)
        series.setdefault(f"{name.method}-{name.suffix}", []).append(point)
    drawn = []
    for members in series.values():
        ordered = sorted(members, key=lambda point: point.parameters)
        path = "L".join(f"{x[point.arm]:.1f},{up(point.score.mean or 0.0):.1f}" for point in ordered)
        if len(ordered) > 1:
            drawn.append(element("path", d=f"M{path}", class_=f"link {look[ordered[0].arm].css}"))
    return drawn
