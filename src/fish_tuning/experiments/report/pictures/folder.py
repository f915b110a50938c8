"""The pictures of a results folder: the metric of every arm, and where the kept entries lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.report.pictures.canvas import Picture, png
from fish_tuning.experiments.report.pictures.heat import heat_picture, largest_share
from fish_tuning.experiments.report.pictures.metric import metric_picture
from fish_tuning.experiments.report.shares import mean_shares
from fish_tuning.files.atomic import write_atomically


def draw_pictures(arms: Sequence[str], runs: Sequence[RunRecord], output_dir: Path) -> dict[Path, str]:
    """Draw `metric.png` and, where a masked arm has finished, `kept.png`. Returns the caption of each path written."""
    metric, kept = metric_picture(arms, runs), kept_heat_maps(arms, runs)
    written = {_write(metric, output_dir / "metric.png"): f"{metric.title}. {metric.description}"}
    if kept is not None:
        caption = "Share of entries kept, in per cent, by layer and module, as a mean over seeds."
        written[_write(kept, output_dir / "kept.png")] = caption
    return written


def kept_heat_maps(arms: Sequence[str], runs: Sequence[RunRecord]) -> Picture | None:
    """A heat map for each masked arm, on one scale; None when no arm has kept entries."""
    finished = {arm: [run for run in runs if run.arm == arm and run.status == "ok"] for arm in arms}
    maps = {arm: shares for arm, mine in finished.items() if (shares := mean_shares(mine))}
    return heat_picture(maps, largest_share(maps)) if maps else None


def _write(picture: Picture, path: Path) -> Path:
    return write_atomically(path, png(picture))
