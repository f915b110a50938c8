"""The score of every arm against its size: arms of one size share a column, which points to its place on the axis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fish_tuning.experiments.config.arm_names import ArmName
from fish_tuning.experiments.report.look import PALETTE, Look
from fish_tuning.experiments.report.pictures.canvas import (
    SMALL,
    Margins,
    Picture,
    add_axes,
    figure_and_axes,
    interval_words,
    number,
    padded,
    size_of,
    style,
    tick_text,
    value_axis,
    write,
)
from fish_tuning.experiments.report.pictures.columns import Column, Layout, arrange
from fish_tuning.experiments.report.pictures.marks import draw_score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARGINS = Margins(52, 12, 22, 60)
_POINTER = 18.0  # from the foot of the columns down to the axis


class Point(NamedTuple):
    arm: str
    size: int
    mean: float
    low: float | None
    high: float | None


def score_size_picture(
    points: Sequence[Point], look: Mapping[str, Look], title: str, of_what: str, width: float, height: float
) -> Picture:
    """`of_what`: what the size counts, for the axis."""
    inner = width - _MARGINS.left - _MARGINS.right
    layout = arrange(Counter(point.size for point in points), inner)
    at = _places(points, layout)
    with style():
        figure, ax = figure_and_axes(width, height, _MARGINS)
        ax.set(xlim=(0, inner), xticks=[])
        ax.set_ylim(*padded([bound for point in points for bound in point[2:] if bound is not None]))
        ax.spines["bottom"].set_visible(False)
        value_axis(ax, "y", 6)
        for column in layout.columns:
            _draw_column(ax, column, layout.named, height - _MARGINS.top - _MARGINS.bottom)
        _size_axis(figure, ax, layout, inner, of_what)
        _links(ax, points, at, look)
        size = min(10.0, layout.step)
        intervals = [
            draw_score(ax, at[point.arm], (point.low, point.mean, point.high), look[point.arm], size, str(place))
            for place, point in enumerate(points)
        ]
        told = {f"{part}-{n}": _told(point, of_what) for n, point in enumerate(points) for part in ("mark", "interval")}
        described = "; ".join(_told(point, of_what) for point in points)
        return Picture(figure, "score-size", title, described, told, interval_words(intervals))


def _places(points: Sequence[Point], layout: Layout) -> dict[str, float]:
    """Arms of one size side by side, in the order in which they come."""
    at: dict[str, float] = {}
    for column in layout.columns:
        arms = [point.arm for point in points if point.size == column.size]
        at |= {arm: column.middle + layout.step * (number - (len(arms) - 1) / 2) for number, arm in enumerate(arms)}
    return at


def _draw_column(ax: Axes, column: Column, named: bool, height: float) -> None:
    """A band with a point at its foot, which lies on the axis, and its exact size where there is room."""
    from matplotlib.patches import Polygon

    left, right = column.middle - column.width / 2, column.middle + column.width / 2
    corners = [(left, 1.0), (right, 1.0), (right, 0.0), (column.place, -_POINTER / height), (left, 0.0)]
    ax.add_patch(
        Polygon(
            corners,
            transform=ax.get_xaxis_transform(),
            facecolor=PALETTE["band"].light,
            edgecolor="none",
            clip_on=False,
            zorder=0.5,
        )
    )
    if named:
        top = ax.get_xaxis_transform()
        ax.text(column.middle, 1.0, f"{column.size:,}", transform=top, ha="center", va="bottom", fontsize=SMALL)


def _size_axis(figure: Figure, ax: Axes, layout: Layout, inner: float, of_what: str) -> None:
    """Below the columns: a piece for nothing, with a gap behind it, and a logarithmic one."""
    if layout.columns[0].size == 0:
        end = 0.8 * layout.start if layout.limits else inner
        _axis_part(figure, 0.0, end).set(xticks=[0.5], xticklabels=["0"])
    if layout.limits:
        part = _axis_part(figure, layout.start, inner)
        part.set(xscale="log", xlim=layout.limits)
        _log_ticks(part, inner - layout.start)
    words = f"{of_what} (log scale)" if layout.limits else of_what
    middle = (size_of(figure)[0] / 2 - _MARGINS.left) / inner
    write(ax, words, (middle, 0), (0, 8 - _MARGINS.bottom), "axes fraction", ha="center", va="baseline")


def _axis_part(figure: Figure, left: float, right: float) -> Axes:
    """An axis below the columns, from left to right of them."""
    bottom = _MARGINS.bottom - _POINTER
    width, height = size_of(figure)
    margins = Margins(_MARGINS.left + left, width - _MARGINS.left - right, height - bottom - 1, bottom)
    part = add_axes(figure, margins)
    part.set(yticks=[], facecolor="none")
    return part


def _log_ticks(part: Axes, width: float) -> None:
    """Powers of ten, with multiples of them where there is room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = part.get_xlim()
    for factors in (range(1, 10), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [tick for tick in LogLocator(subs=factors, numticks=99).tick_values(low, high) if low <= tick <= high]
        if len(ticks) * 60 <= width:
            break
    part.set_xticks(ticks)
    part.xaxis.set_major_formatter(FuncFormatter(tick_text))
    part.xaxis.set_minor_formatter(NullFormatter())
    part.tick_params(which="major", length=4)


def _links(ax: Axes, points: Sequence[Point], at: Mapping[str, float], look: Mapping[str, Look]) -> None:
    """Lines through the budgets of one arm."""
    series: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        name = ArmName.parse(point.arm)
        series.setdefault((name.method, name.suffix), []).append(point)
    for members in series.values():
        ordered = sorted(members, key=lambda point: at[point.arm])
        if len(ordered) > 1:
            ax.plot(
                [at[point.arm] for point in ordered],
                [point.mean for point in ordered],
                color=look[ordered[0].arm].hex,
                linewidth=1.5,
                alpha=0.5,
                zorder=2,
            )


def _told(point: Point, of_what: str) -> str:
    interval = (
        "" if point.low is None or point.high is None else f", interval {number(point.low)} to {number(point.high)}"
    )
    return f"{point.arm}: {point.size:,} {of_what}, {number(point.mean)}{interval}"
