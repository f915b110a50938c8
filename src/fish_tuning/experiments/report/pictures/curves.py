"""The training loss of every arm, as a mean over its seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import isfinite
from statistics import fmean

from fish_tuning.experiments.config.arm_names import ArmName
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.report.look import PALETTE, Look
from fish_tuning.experiments.report.pictures.canvas import (
    SMALL,
    Margins,
    Picture,
    figure_and_axes,
    style,
    value_axis,
    write,
)
from fish_tuning.experiments.report.pictures.marks import draw_mark

Curve = list[tuple[int, float]]
_MARGINS = Margins(52, 14, 12, 44)


def mean_curve(runs: Sequence[RunRecord]) -> Curve:
    """The mean loss at every step that all seeds logged; of any, where they share none."""
    logged = [run.loss_curve for run in runs if run.loss_curve]
    losses: dict[int, list[float]] = defaultdict(list)
    for step, loss in (point for curve in logged for point in curve):
        if isfinite(loss):
            losses[step].append(loss)
    shared = {step: values for step, values in losses.items() if len(values) == len(logged)}
    return [(step, fmean(values)) for step, values in sorted((shared or losses).items())]


def curves_picture(
    drawn: Mapping[str, Curve], look: Mapping[str, Look], title: str, width: float, height: float
) -> Picture:
    """A line for each arm, with its own dashes, and its mark on it where the other arms' marks are not."""
    with style():
        figure, ax = figure_and_axes(width, height, _MARGINS)
        value_axis(ax, "x", int(width) // 70)
        value_axis(ax, "y", 6)
        ax.xaxis.grid(False)
        ax.set_xlabel("step")
        alike = list(look.values())
        for number, ((arm, curve), (step, loss)) in enumerate(zip(drawn.items(), _marked(drawn), strict=True)):
            ax.plot(
                *zip(*curve, strict=True),
                color=look[arm].hex,
                linewidth=1.6,
                linestyle=(0, look[arm].dashes),
                gid=f"curve-{number}",
            )
            draw_mark(ax, step, loss, look[arm], 8.0, f"mark-{number}")
            if alike.count(look[arm]) > 1:  # arms that only differ by their budget
                name, ink = ArmName.parse(arm).budget, PALETTE["ink"].light
                write(ax, name, (step, loss), (0, 8), ha="center", fontsize=SMALL, color=ink, gid=f"budget-{number}")
        ax.set_xlim(0, 1.02 * max(curve[-1][0] for curve in drawn.values()) or 1.0)
        told = {f"{part}-{n}": arm for n, arm in enumerate(drawn) for part in ("curve", "mark", "budget")}
        said = "; ".join(f"{arm}: from {curve[0][1]:.3f} to {curve[-1][1]:.3f}" for arm, curve in drawn.items())
        return Picture(figure, "curves", title, said, told)


def _marked(drawn: Mapping[str, Curve]) -> list[tuple[int, float]]:
    """A point of each curve, spread over the second half of the picture."""
    shares = [0.45 + 0.55 * (number + 1) / len(drawn) for number in range(len(drawn))]
    return [curve[round(share * (len(curve) - 1))] for share, curve in zip(shares, drawn.values(), strict=True)]
