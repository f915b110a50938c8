"""The pictures of a results folder: the metric of every arm, and where the kept entries lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.report.pictures.canvas import Picture, png
from fish_tuning.experiments.report.pictures.heat import heat_picture, largest_share
from fish_tuning.experiments.report.pictures.metric import metric_picture
from fish_tuning.experiments.report.shares import mean_shares
from fish_tuning.files.atomic import write_atomically
from fish_tuning.registry import Registry

Draw = Callable[[Sequence[str], Sequence[RunRecord]], Picture | None]

PICTURES: Registry[Draw] = Registry("picture")


def register_picture(name: str) -> Callable[[Draw], Draw]:
    """Decorator: a picture of your own, drawn into every results folder as `<name>.png` and shown in `results.md`.

    The function gets the names of all arms and the records of the runs, and gives a `Picture` (a matplotlib figure with
    a title and a description), or None where there is nothing to draw.

    Example:
        >>> from fish_tuning.experiments.report.pictures.folder import Picture, register_picture
        >>> @register_picture("seconds")
        ... def seconds(arms, runs):
        ...     from matplotlib.figure import Figure
        ...     figure = Figure()
        ...     figure.subplots().bar(arms, [sum(r.train_seconds or 0 for r in runs if r.arm == arm) for arm in arms])
        ...     return Picture(figure, "seconds", "Seconds of training", "A bar for each arm.")
    """
    return PICTURES.register(name)


def draw_pictures(arms: Sequence[str], runs: Sequence[RunRecord], output_dir: Path) -> dict[Path, str]:
    """Draw every registered picture that has something to show. Returns the caption of each path written."""
    drawn = {name: draw(arms, runs) for name, draw in PICTURES.items()}
    return {
        write_atomically(output_dir / f"{name}.png", png(picture)): f"{picture.title}. {picture.description}"
        for name, picture in drawn.items()
        if picture is not None
    }


register_picture("metric")(metric_picture)


@register_picture("kept")
def kept_heat_maps(arms: Sequence[str], runs: Sequence[RunRecord]) -> Picture | None:
    """A heat map for each masked arm, on one scale; None when no arm has kept entries."""
    finished = {arm: [run for run in runs if run.arm == arm and run.status == "ok"] for arm in arms}
    maps = {arm: shares for arm, mine in finished.items() if (shares := mean_shares(mine))}
    return heat_picture(maps, largest_share(maps)) if maps else None
