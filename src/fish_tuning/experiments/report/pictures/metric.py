"""The metric of every arm: a dot for each seed, the mean and its interval."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING

from fish_tuning.experiments.compare.summaries import ArmSummary, summarize
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.report.look import PALETTE, Look, label, looks
from fish_tuning.experiments.report.pictures.canvas import (
    FONT,
    SMALL,
    Margins,
    Picture,
    figure_and_axes,
    fitted,
    interval_words,
    number,
    style,
    value_axis,
    write,
)
from fish_tuning.experiments.report.pictures.marks import draw_score
from fish_tuning.experiments.report.pictures.sizes import arm_sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARGINS = Margins(64, 12, 36, 58)
_COLUMN = 112.0  # the least width of one
_NAME = 180.0  # the most width of a name
_HEIGHT = 400


def metric_picture(arms: Sequence[str], runs: Sequence[RunRecord]) -> Picture:
    """A column for each arm, in this order."""
    column = max([_COLUMN] + [fitted(arm, _NAME)[1] + 12 for arm in arms])
    metric = label(next((run.metric for run in runs), "metric").replace("_", " "))
    summaries = {summary.arm: summary for summary in summarize(runs)}
    sizes, of_what = arm_sizes([run for run in runs if run.status == "ok"])
    intervals: list[bool] = []
    with style():
        figure, ax = figure_and_axes(_MARGINS.left + _MARGINS.right + column * max(1, len(arms)), _HEIGHT, _MARGINS)
        for x, (arm, look) in enumerate(looks(arms).items()):
            values = _values(runs, arm)
            intervals += _column(ax, x, values, summaries.get(arm), look)
            _below(ax, x, arm, f"{sizes[arm]:,} {of_what}" if arm in sizes else "", _failed(summaries.get(arm)))
        value_axis(ax, "y", 6)
        ax.margins(y=0.08)
        ax.set(xlim=(-0.5, max(1, len(arms)) - 0.5), xticks=[], ylabel=metric)
        if not intervals:
            ax.set_yticks([])
        said = _said(intervals)
        ax.set_title(said, fontsize=SMALL, loc="left", pad=12)
        return Picture(figure, "metric", f"{metric} of every arm", said)


def _said(intervals: Sequence[bool]) -> str:
    return f"Dots: seeds; marks: means {interval_words(intervals)}." if intervals else "No run has finished."


def _values(runs: Sequence[RunRecord], arm: str) -> list[float]:
    return [
        run.value
        for run in runs
        if run.arm == arm and run.status == "ok" and run.value is not None and isfinite(run.value)
    ]


def _column(ax: Axes, x: int, values: Sequence[float], summary: ArmSummary | None, look: Look) -> list[bool]:
    """Dots on the left, side by side, so that equal values do not hide each other. Returns whether the mean, if there
    is one, has an interval."""
    if summary is None or summary.mean is None or not isfinite(summary.mean):
        reason = "not run" if summary is None else "failed"
        ax.text(x, 0.5, reason, transform=ax.get_xaxis_transform(), ha="center", style="italic")
        return []
    step = min(0.07, 0.24 / max(1, len(values) - 1))
    left = [x - 0.12 - step * number for number in range(len(values))]
    ax.scatter(left, values, s=24, color=look.hex, alpha=0.6, linewidths=0, clip_on=False, zorder=3)
    there = draw_score(ax, x + 0.12, (summary.low, summary.mean, summary.high), look, 10.0, str(x))
    write(ax, number(summary.mean), (x + 0.12, summary.mean), (9, 0), va="center", color=PALETTE["ink"].light)
    return [there]


def _failed(summary: ArmSummary | None) -> str:
    return f"{summary.n_failed} failed" if summary is not None and summary.n_failed else ""


def _below(ax: Axes, x: int, arm: str, *remarks: str) -> None:
    """The name of a column, and remarks in smaller letters."""
    lines = [(fitted(arm, _NAME)[0], FONT, PALETTE["ink"].light)]
    lines += [(remark, SMALL, PALETTE["muted"].light) for remark in remarks if remark]
    for place, (text, size, colour) in enumerate(lines):
        down = (0.0, -18.0 - 15 * place)
        write(ax, text, (x, 0), down, ax.get_xaxis_transform(), ha="center", fontsize=size, color=colour)
