"""Pictures with a row for each arm: paired differences, and seconds. Names stand above where there is little room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fish_tuning.experiments.report.look import PALETTE, Look
from fish_tuning.experiments.report.pictures.canvas import (
    Margins,
    Picture,
    figure_and_axes,
    fitted,
    has_interval,
    interval_words,
    padded,
    style,
    value_axis,
    write,
)
from fish_tuning.experiments.report.pictures.marks import draw_interval, draw_mark

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NARROW = 480  # below, names stand above their rows
_RIGHT, _TOP, _BOTTOM = 14.0, 6.0, 46.0


class Difference(NamedTuple):
    """A row; `told` says it in words."""

    name: str
    mean: float
    low: float | None
    high: float | None
    look: Look
    told: str


class Seconds(NamedTuple):
    name: str
    scoring: float
    training: float


class Words(NamedTuple):
    """The title of a picture of differences, and what lies on either side of zero."""

    title: str
    below: str
    above: str


def differences_picture(rows: Sequence[Difference], words: Words, width: float) -> Picture:
    """The mean difference of each row and its interval."""
    with style():
        figure, ax = _rows([row.name for row in rows], width)
        ax.set_xlim(*padded([0.0, *(bound for row in rows for bound in row[1:4] if bound is not None)]))
        ax.axvline(0, color=PALETTE["muted"].light, linewidth=1.5, zorder=1)
        for y, row in enumerate(rows):
            if row.low is not None and row.high is not None and has_interval(row.low, row.high):
                draw_interval(ax, (row.low, row.high), (y, y), row.look, gid=f"interval-{y}")
            draw_mark(ax, row.mean, y, row.look, gid=f"mark-{y}")
        for x, side, text in (
            (0.0, "left", f"\N{LEFTWARDS ARROW} {words.below}"),
            (1.0, "right", f"{words.above} \N{RIGHTWARDS ARROW}"),
        ):
            _under(ax, x, side, text)
        intervals = interval_words(has_interval(row.low, row.high) for row in rows)
        told = {f"{part}-{y}": row.told for y, row in enumerate(rows) for part in ("mark", "interval")}
        return Picture(figure, "differences", words.title, "; ".join(row.told for row in rows), told, intervals)


def seconds_picture(rows: Sequence[Seconds], title: str, width: float) -> Picture:
    """Seconds of scoring (hatched) and of training (solid)."""
    grey, ground = PALETTE["muted"].light, PALETTE["ground"].light
    high = 14 / _row_height(width)
    with style():
        figure, ax = _rows([row.name for row in rows], width)
        ax.set_xlim(0, 1.02 * max(row.scoring + row.training for row in rows) or 1.0)
        for y, row in enumerate(rows):
            if row.scoring:
                ax.barh(y, row.scoring, high, color=ground, edgecolor=grey, lw=0, hatch="////", gid=f"scoring-{y}")
            ax.barh(y, row.training, high, row.scoring, color=grey, lw=0, gid=f"training-{y}")
        _under(ax, 0.5, "center", "seconds")
        said = [f"{row.name}: {row.scoring:.1f} s scoring, {row.training:.1f} s training" for row in rows]
        told = {f"{part}-{y}": each for y, each in enumerate(said) for part in ("scoring", "training")}
        return Picture(figure, "seconds", title, "; ".join(said), told)


def _row_height(width: float) -> float:
    return 42.0 if width < _NARROW else 30.0


def _rows(names: Sequence[str], width: float) -> tuple[Figure, Axes]:
    """Axes with row `n` around y = n, from the top, and the names beside or above."""
    narrow, height = width < _NARROW, _row_height(width)
    shown = [fitted(name, width - 2 * _RIGHT if narrow else width / 2) for name in names]
    left = _RIGHT if narrow else max(wide for _, wide in shown) + 36
    figure, ax = figure_and_axes(width, _TOP + height * len(names) + _BOTTOM, Margins(left, _RIGHT, _TOP, _BOTTOM))
    # In the lower part of a row, where the name is above.
    top = -0.5 - (8 / height if narrow else 0)
    ax.set(ylim=(len(names) + top, top), yticks=[])
    ax.spines["bottom"].set_visible(False)
    value_axis(ax, "x", max(3, int(width - left) // 75))
    for y, (name, _) in enumerate(shown):
        moved, side = ((0.0, 16.0), "left") if narrow else ((-14.0, 0.0), "right")
        ink = PALETTE["ink"].light
        at = ax.get_yaxis_transform()
        write(ax, name, (0, y), moved, at, ha=side, va="center_baseline", color=ink, gid=f"name-{y}")
    return figure, ax


def _under(ax: Axes, x: float, side: str, text: str) -> None:
    write(ax, text, (x, 0), (0, -36), "axes fraction", ha=side, va="baseline")
