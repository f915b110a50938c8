"""The two pictures of a report: the metric of every arm, and where the kept entries lie."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fish_tuning.experiments.compare.summaries import ArmSummary, summarize
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.files.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#000000", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#D55E00", "#56B4E9")
DPI = 150
MOST_COLUMNS = 30  # of heat maps side by side; more are stacked
_GREY = "#666666"

Shares = dict[tuple[int | None, str], float]


def draw_figures(arms: Sequence[str], runs: Sequence[RunRecord], output_dir: Path) -> list[Path]:
    """Draw `metric.png` and, where a masked arm has finished, `kept.png`. Returns the paths written."""
    drawn = {"metric.png": metric_figure(arms, runs), "kept.png": kept_figure(arms, runs)}
    return [_save(figure, output_dir / name) for name, figure in drawn.items() if figure is not None]


def metric_figure(arms: Sequence[str], runs: Sequence[RunRecord]) -> Figure:
    """A column for each arm: a dot for each seed, the mean, and its 95 % interval."""
    summaries = {summary.arm: summary for summary in summarize(runs)}
    figure, axes = _subplots((1, 1), (max(4.5, 1.2 + 1.35 * len(arms)), 4.2))
    ax = axes[0]
    labels = []
    for x, arm in enumerate(arms):
        summary = summaries.get(arm)
        values = [run.value for run in runs if run.arm == arm and run.status == "ok" and run.value is not None]
        labels.append(_arm_label(arm, summary))
        if summary is None or not values:
            reason = "not run" if summary is None else "failed"
            ax.text(x, 0.5, reason, transform=ax.get_xaxis_transform(), ha="center", color=_GREY, style="italic")
            continue
        _draw_arm(ax, x, values, summary, COLOURS[x % len(COLOURS)])
    metric = next((run.metric for run in runs), "metric").replace("_", " ")
    seeds = len({run.seed for run in runs})
    ax.set_ylabel(metric)
    ax.set_title(
        f"Dots: {seeds} {'seed' if seeds == 1 else 'seeds'}; bars: mean and 95 % interval", fontsize=10, loc="left"
    )
    ax.set_xticks(range(len(arms)), labels)
    ax.set_xlim(-0.5, len(arms) - 0.5)
    ax.yaxis.grid(True, color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
    if not any(summary.n_ok for summary in summaries.values()):
        ax.set_yticks([])
    return figure


def _draw_arm(ax: Axes, x: int, values: Sequence[float], summary: ArmSummary, colour: str) -> None:
    # Dots stand to the left of the mean, side by side, so that equal values do not hide each other.
    step = min(0.07, 0.2 / max(1, len(values) - 1))
    left = [x - 0.12 - step * number for number in range(len(values))]
    ax.scatter(left, values, s=26, color=colour, alpha=0.65, linewidths=0, zorder=3)
    mean = summary.mean
    if mean is None:
        return
    bounds = None if summary.low is None or summary.high is None else [[mean - summary.low], [summary.high - mean]]
    ax.errorbar(x + 0.12, mean, yerr=bounds, fmt="_", ms=14, mew=2.2, color=colour, capsize=4, lw=1.6, zorder=4)
    ax.annotate(f"{mean:.3f}", (x + 0.12, mean), (11, 0), textcoords="offset points", va="center", fontsize=9)


def _arm_label(arm: str, summary: ArmSummary | None) -> str:
    if summary is None or summary.trainable_parameters is None:
        return arm
    failed = f"\n{summary.n_failed} failed" if summary.n_failed else ""
    return f"{arm}\n{summary.trainable_parameters:,}\ntrainable{failed}"


def kept_figure(arms: Sequence[str], runs: Sequence[RunRecord]) -> Figure | None:
    """A heat map of layers and modules for each masked arm, on one colour scale; None when no arm has kept entries."""
    panels = {arm: shares for arm in arms if (shares := _mean_shares(runs, arm))}
    if not panels:
        return None
    layers = sorted({key[0] for shares in panels.values() for key in shares}, key=lambda n: -1 if n is None else n)
    # Arms of one method have the same modules; another method's would only leave empty columns.
    modules = {arm: sorted({module for _, module in shares}) for arm, shares in panels.items()}
    widths = [len(names) for names in modules.values()]
    stacked = sum(widths) > MOST_COLUMNS
    top = max(max(shares.values()) for shares in panels.values()) or 1.0
    cell_width, cell_height = 0.52, 0.34 if len(layers) > 12 else 0.42
    height = max(1.5, len(layers) * cell_height) + 1.9
    if stacked:
        figure, axes = _subplots((len(panels), 1), (max(widths) * cell_width + 2.3, height * len(panels)))
    else:
        width = sum(widths) * cell_width + len(panels) * 0.35 + 1.9
        figure, axes = _subplots((1, len(panels)), (max(width, 5.0), height), sharey=True, width_ratios=widths)
    image = None
    for ax, (arm, shares) in zip(axes, panels.items(), strict=True):
        grid = [[shares.get((layer, module), float("nan")) for module in modules[arm]] for layer in layers]
        image = ax.imshow(grid, cmap="cividis", vmin=0, vmax=top, aspect="auto")
        _write_numbers(ax, grid, top)
        ax.set_title(arm, fontsize=11)
        ticks = range(len(modules[arm]))
        ax.set_xticks(ticks, modules[arm], rotation=60, ha="right", rotation_mode="anchor", fontsize=9)
        ax.tick_params(length=0)
    for ax in axes if stacked else axes[:1]:
        ax.set_yticks(range(len(layers)), ["-" if layer is None else str(layer) for layer in layers])
        ax.set_ylabel("layer")
    if image is not None:
        shrink = 0.5 if stacked else min(1.0, 3.0 / (height - 1.9) + 0.2)
        bar = figure.colorbar(image, ax=axes, shrink=shrink, pad=0.02)
        bar.set_label("share of entries kept, %")
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    return figure


def _mean_shares(runs: Sequence[RunRecord], arm: str) -> Shares:
    """Kept over total by layer and module, as a mean over the seeds that finished."""
    seeds: dict[tuple[int | None, str], list[float]] = defaultdict(list)
    for run in runs:
        if run.arm == arm and run.status == "ok":
            for share in run.kept:
                seeds[share.layer, share.module].append(share.kept / share.total if share.total else 0.0)
    return {key: fmean(values) for key, values in seeds.items()}


def _write_numbers(ax: Axes, grid: Sequence[Sequence[float]], top: float) -> None:
    """Percentages in the cells, in the colour that stands out."""
    for row, line in enumerate(grid):
        for column, share in enumerate(line):
            if share == share:  # a module that a layer lacks is NaN
                colour = "black" if share > 0.55 * top else "white"
                ax.text(column, row, _percent(share), ha="center", va="center", fontsize=8, color=colour)


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f}" if percent >= 9.95 or percent == 0 else f"{percent:.1f}"


def _subplots(shape: tuple[int, int], size: tuple[float, float], **options: Any) -> tuple[Figure, list[Axes]]:
    # A Figure of its own instead of pyplot: no global state, no display, and nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(*shape, squeeze=False, **options).flat)
    for ax in axes:
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    return write_atomically(path, picture.getvalue())
