"""Paired differences, a row each; and bars of seconds. Both put names above where there is little room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from fish_tuning.experiments.compare.comparisons import Comparison
from fish_tuning.experiments.report.page.marks import Look, mark
from fish_tuning.experiments.report.page.svg import (
    Scale,
    element,
    line,
    linear,
    padded,
    picture,
    text,
    tick_text,
    ticks,
)

_NARROW = 480  # below, names stand above their rows
_CHARACTER = 6.7  # width of one at the font size of the pictures


class Words(NamedTuple):
    """The title of a picture of differences, and what lies on either side of zero."""

    title: str
    below: str
    above: str


def forest(
    comparisons: Sequence[Comparison], names: Sequence[str], look: Mapping[str, Look], width: int, words: Words
) -> Markup:
    """A row for each comparison, with its name: the mean difference and its interval."""
    rows = [(each, name) for each, name in zip(comparisons, names, strict=True) if each.mean_difference is not None]
    drawn = [each for each, _ in rows]
    left, row, top = _layout([name for _, name in rows], width)
    bounds = [value for each in drawn for value in (each.low, each.mean_difference, each.high) if value is not None]
    low, high = padded([0.0, *bounds])
    across = linear(low, high, left, width - 12)
    base = top + row * len(drawn)
    return picture(
        width,
        base + 44,
        words.title,
        "; ".join(map(_told, drawn)),
        *(
            _column(across(tick), tick_text(tick), top, base)
            for tick in ticks(low, high, max(3, int(width - left) // 75))
        ),
        line(across(0), top, across(0), base, class_="zero"),
        text(left, base + 36, f"← {words.below}", class_="label"),
        text(width - 12, base + 36, f"{words.above} →", "end", "label"),
        *(
            _row(each, name, across, top + row * number, row, left, look[each.arm])
            for number, (each, name) in enumerate(rows)
        ),
        class_="forest",
    )


def bars(rows: Sequence[tuple[str, float, float]], width: int) -> Markup:
    """Seconds of scoring (hatched) and of training (solid) for each arm."""
    left, row, top = _layout([name for name, _, _ in rows], width)
    longest = max(scoring + training for _, scoring, training in rows) or 1.0
    across = linear(0, longest * 1.02, left, width - 12)
    base = top + row * len(rows)
    marks = ticks(0, longest * 1.02, max(3, int(width - left) // 75))
    return picture(
        width,
        base + 44,
        "Time of one run",
        "; ".join(f"{name}: {scoring:.1f} s scoring, {training:.1f} s training" for name, scoring, training in rows),
        element(
            "defs",
            element(
                "pattern",
                element("rect", width=6, height=6, class_="hatch-ground"),
                element("path", d="M0,6L6,0", class_="hatch"),
                id=f"hatch-{width}",
                width=6,
                height=6,
                patternUnits="userSpaceOnUse",
            ),
        ),
        *(_column(across(tick), tick_text(tick), top, base) for tick in marks),
        text((left + width) / 2, base + 36, "seconds", "middle", "label"),
        *(_bar(each, across, top + row * number, row, left, f"hatch-{width}") for number, each in enumerate(rows)),
        class_="bars",
    )


def spoken_difference(comparison: Comparison) -> str:
    """`-0.012 [-0.028, +0.005]`, without the brackets where there is no interval."""
    if comparison.mean_difference is None:
        return "no pair"
    return f"{signed(comparison.mean_difference)} {spoken_bounds(comparison.low, comparison.high)}".strip()


def spoken_bounds(low: float | None, high: float | None) -> str:
    """`[-0.028, +0.005]`, or nothing."""
    return "" if low is None or high is None else f"[{signed(low)}, {signed(high)}]"


def signed(value: float) -> str:
    """`+0.012`, and `+0.000` for what rounds to nothing."""
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", "\N{MINUS SIGN}")


def _layout(names: Sequence[str], width: int) -> tuple[float, float, float]:
    """Where the rows start, their height, and the top."""
    if width < _NARROW:
        return 12.0, 42.0, 4.0
    return max(map(len, names)) * _CHARACTER + 40.0, 30.0, 4.0


def _column(x: float, words: str, top: float, base: float) -> Markup:
    return line(x, top, x, base, class_="grid") + text(x, base + 16, words, "middle")


def _name(name: str, y: float, row: float, left: float) -> tuple[Markup, float]:
    """The name, and the middle of what is drawn beside or below it."""
    if left < 20:
        return text(left, y + 15, name, class_="name"), y + 29
    return text(left - 14, y + row / 2 + 4, name, "end", "name"), y + row / 2


def _told(each: Comparison) -> str:
    return f"{each.arm} minus {each.baseline}: {spoken_difference(each)}, {each.verdict}"


def _row(each: Comparison, name: str, across: Scale, y: float, row: float, left: float, look: Look) -> Markup:
    label, middle = _name(name, y, row, left)
    whisker = Markup()
    if each.low is not None and each.high is not None:
        x1, x2 = across(each.low), across(each.high)
        ends = "".join(f"M{x:.1f},{middle - 4:.1f}v8" for x in (x1, x2))
        whisker = element("path", d=f"M{x1:.1f},{middle:.1f}H{x2:.1f}{ends}", class_=f"whisker {look.css}")
    told = element("title", _told(each))
    return element("g", told, label, whisker, mark(across(each.mean_difference or 0.0), middle, look))


def _bar(each: tuple[str, float, float], across: Scale, y: float, row: float, left: float, pattern: str) -> Markup:
    label, scoring, training = each
    name, middle = _name(label, y, row, left)
    start, edge, end = across(0), across(scoring), across(scoring + training)
    height = 14 if left > 20 else 12
    return element(
        "g",
        element("title", f"{label}: {scoring:.1f} s scoring, {training:.1f} s training"),
        name,
        element("rect", x=start, y=middle - height / 2, width=edge - start, height=height, fill=f"url(#{pattern})"),
        element("rect", x=edge, y=middle - height / 2, width=end - edge, height=height, class_="training"),
    )
