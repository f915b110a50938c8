"""The training loss of every arm, as a mean over its seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from markupsafe import Markup

from fish_tuning.experiments.config.arm_names import ArmName
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.report.page.marks import Look, mark
from fish_tuning.experiments.report.page.svg import element, line, linear, padded, picture, text, tick_text, ticks

Curve = list[tuple[int, float]]
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 44


def mean_curve(runs: Sequence[RunRecord]) -> Curve:
    """The mean loss at every step that all seeds logged; of any, where they share none."""
    logged = [run.loss_curve for run in runs if run.loss_curve]
    losses: dict[int, list[float]] = defaultdict(list)
    for step, loss in (point for curve in logged for point in curve):
        if loss == loss and abs(loss) != float("inf"):
            losses[step].append(loss)
    shared = {step: values for step, values in losses.items() if len(values) == len(logged)}
    return [(step, fmean(values)) for step, values in sorted((shared or losses).items())]


def curves(drawn: Mapping[str, Curve], look: Mapping[str, Look], title: str, width: int, height: int = 260) -> Markup:
    """A line for each arm, with its own dashes, and its mark on it where the other arms' marks are not."""
    points = [point for curve in drawn.values() for point in curve]
    steps, (bottom, top) = [step for step, _ in points], padded([loss for _, loss in points])
    last = max(steps) or 1
    across = linear(0, last * 1.02, _LEFT, width - _RIGHT)
    up = linear(bottom, top, height - _BOTTOM, _TOP)
    base = height - _BOTTOM
    return picture(
        width,
        height,
        title,
        "; ".join(f"{arm}: from {curve[0][1]:.3f} to {curve[-1][1]:.3f}" for arm, curve in drawn.items()),
        *(
            line(_LEFT, up(tick), width - _RIGHT, up(tick), class_="grid")
            + text(_LEFT - 6, up(tick) + 4, tick_text(tick), "end")
            for tick in ticks(bottom, top)
        ),
        *(text(across(tick), base + 17, tick_text(tick), "middle") for tick in ticks(0, last * 1.02, width // 70)),
        line(_LEFT, base, width - _RIGHT, base, class_="axis"),
        text((_LEFT + width - _RIGHT) / 2, height - 8, "step", "middle", "label"),
        *(
            element(
                "g",
                element("title", arm),
                element(
                    "polyline",
                    points=" ".join(f"{across(step):.1f},{up(loss):.1f}" for step, loss in curve),
                    class_=f"curve {look[arm].css}",
                    stroke_dasharray=look[arm].dash,
                ),
                mark(across(point[0]), up(point[1]), look[arm], 4.0),
                _budget(arm, across(point[0]), up(point[1])) if list(look.values()).count(look[arm]) > 1 else "",
            )
            for (arm, curve), point in zip(drawn.items(), _marked(drawn), strict=True)
        ),
        class_="curves",
    )


def _budget(arm: str, x: float, y: float) -> Markup:
    """Beside the mark, which arms that only differ by it share."""
    return text(x, y - 8, ArmName.parse(arm).budget, "middle", "name small")


def _marked(drawn: Mapping[str, Curve]) -> list[tuple[int, float]]:
    """A point of each curve, spread over the second half of the picture."""
    shares = [0.45 + 0.55 * (number + 1) / len(drawn) for number in range(len(drawn))]
    return [curve[round(share * (len(curve) - 1))] for share, curve in zip(shares, drawn.values(), strict=True)]
