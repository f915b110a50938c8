"""Marks of arms, and means with their intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fish_tuning.experiments.report.look import PALETTE, Look
from fish_tuning.experiments.report.pictures.canvas import Margins, Picture, figure_and_axes, has_interval, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of one width as they are named, marks would seem to differ in size.
_SIZES = {"s": 0.9, "D": 0.85, "^": 1.1, "v": 1.1, "<": 1.1, ">": 1.1, "P": 1.15, "X": 1.15, "*": 1.45, "p": 1.1}


def draw_mark(ax: Axes, x: float, y: float, look: Look, size: float = 10.0, gid: str | None = None) -> None:
    """A filled mark, `size` pixels wide, with its sign inside."""
    ax.plot(
        [x],
        [y],
        marker=look.mark,
        markersize=size * _SIZES.get(look.mark, 1.0),
        markerfacecolor=look.hex,
        markeredgecolor=PALETTE["ground"].light,
        markeredgewidth=0.8,
        linestyle="none",
        clip_on=False,
        zorder=4,
        gid=gid,
    )
    if look.sign:
        ax.plot(
            [x],
            [y],
            marker=look.sign,
            markersize=size * 0.6,
            markeredgecolor=PALETTE["ground"].light,
            markeredgewidth=1.6,
            linestyle="none",
            clip_on=False,
            zorder=5,
        )


def draw_interval(
    ax: Axes, x: tuple[float, float], y: tuple[float, float], look: Look, cap: float = 4.0, gid: str | None = None
) -> None:
    """A line from one end to the other with caps, `cap` pixels to either side; upright or level."""
    upright = x[0] == x[1]
    ax.plot(
        x,
        y,
        color=look.hex,
        linewidth=1.8,
        marker="_" if upright else "|",
        markersize=2 * cap,
        markeredgewidth=1.8,
        solid_capstyle="butt",
        clip_on=False,
        zorder=3,
        gid=gid,
    )


def draw_score(
    ax: Axes, x: float, bounds: tuple[float | None, float, float | None], look: Look, size: float, gid: str
) -> bool:
    """A mean, as a mark, and its interval where there is one. Returns whether there is. `bounds`: low, mean, high."""
    low, mean, high = bounds
    there = has_interval(low, high)
    if low is not None and high is not None and there:
        draw_interval(ax, (x, x), (low, high), look, 0.4 * size, f"interval-{gid}")
    draw_mark(ax, x, mean, look, size, f"mark-{gid}")
    return there


def swatch(look: Look) -> Picture:
    """The mark alone, for a legend."""
    with style():
        figure, ax = figure_and_axes(16, 16, Margins(0, 0, 0, 0))
        ax.set_axis_off()
        ax.set(xlim=(0, 16), ylim=(0, 16))
        draw_mark(ax, 8, 8, look)
        return Picture(figure, "swatch", "", "")
