"""The page: what the template shows, put together from the results."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from os.path import commonprefix
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fish_tuning import __version__
from fish_tuning.experiments.report.look import looks, style_sheet
from fish_tuning.experiments.report.page import pictures, words
from fish_tuning.experiments.report.page.costs import costs
from fish_tuning.experiments.report.page.differences import spoken_bounds, spoken_difference
from fish_tuning.experiments.report.page.load import Experiment
from fish_tuning.experiments.report.page.masks import agreements, joined
from fish_tuning.experiments.report.page.results import Results, Score
from fish_tuning.experiments.report.pictures.heat import scale_colours
from fish_tuning.experiments.report.shares import percent
from fish_tuning.experiments.report.tables import fact_text


def html_page(results: Results, experiments: Sequence[Experiment], notes: Sequence[str]) -> str:
    """The whole page as one file, with style and pictures in it."""
    from jinja2 import Environment, StrictUndefined

    here = Path(__file__).parent
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((here / "page.html").read_text(encoding="utf-8"))
    overlaps, unread = agreements(experiments)
    look = looks(results.arms)
    return template.render(
        results=results,
        experiments=[_settings(experiment) for experiment in experiments],
        notes=[*notes, *unread],
        style=Markup(style_sheet() + (here / "page.css").read_text(encoding="utf-8")),
        title=_title(experiments),
        columns=[*results.tasks, *(["average"] if results.averages else [])],
        dashes=any(not (each.values or each.n_failed or each.n_missing) for each in results.scores.values()),
        intervals=any(score.low is not None for score in results.scores.values()),
        cells={arm: _cells(results, arm) for arm in results.arms},
        legend=pictures.legend(look),
        score_sizes=pictures.score_sizes(results, look),
        differences=pictures.differences(results.to_dense, look, pictures.TO_DENSE, "dense"),
        choices=pictures.differences(results.of_choice, look, pictures.OF_CHOICE, "choice"),
        curves=pictures.curves(results, look),
        heats=pictures.heat_maps(results),
        budgets=len(set(look.values())) < len(look),
        scale=scale_colours() if any(run.kept for run in results.runs) else [],
        factors=pictures.factors(results),
        overlaps=joined(overlaps),
        overlaps_apart=overlaps,
        costs=(measured := costs(results)),
        seconds=pictures.seconds(measured),
        words=words,
        bounds=spoken_bounds,
        spoken=spoken_difference,
        percent=percent,
        version=__version__,
        written=datetime.now(UTC),
        failed=_seeds((run.arm, run.task, run.error or "", run.seed) for run in results.failed),
        missing=_seeds((arm, task, "", seed) for task, arm, seed in results.missing),
    )


def _title(experiments: Sequence[Experiment]) -> str:
    names = list(dict.fromkeys(experiment.name for experiment in experiments))
    if len(names) <= 3:
        return words.listed(names)
    shared = commonprefix(names).rpartition("-")[0]  # noqa: RUF071 - of words, not of paths
    return f"{shared}: {len(experiments)} experiments" if shared else f"{len(experiments)} experiments"


def _cells(results: Results, arm: str) -> list[dict[str, Any]]:
    """One for each column, the average last."""
    cells = [_cell(results.scores[arm, task], words.mark_of(results, arm, task)) for task in results.tasks]
    if results.averages:
        cells.append(_cell(results.averages[arm], words.mark_of(results, arm, None), average=True))
    return cells


def _cell(score: Score, mark: str, average: bool = False) -> dict[str, Any]:
    return {
        "mean": words.mean_text(score),
        "interval": words.interval_text(score),
        "mark": mark,
        "remarks": words.remarks(score, average),
        "bad": score.n_failed > 0 or score.n_missing > 0,
    }


def _seeds(runs: Iterable[tuple[str, str, str, int]]) -> list[tuple[str, str, str, list[int]]]:
    """Arm, task and error, each once with its seeds."""
    seeds: dict[tuple[str, str, str], list[int]] = {}
    for arm, task, error, seed in runs:
        seeds.setdefault((arm, task, error), []).append(seed)
    return [(*key, found) for key, found in seeds.items()]


def _settings(experiment: Experiment) -> dict[str, Any]:
    import yaml

    facts = {key.replace("_", " "): fact_text(value) for key, value in experiment.facts.items() if key != "notes"}
    return {
        "name": experiment.name,
        "folder": str(experiment.folder),
        "facts": facts,
        "config_file": shlex.quote(f"{experiment.name}.yaml"),
        "config": yaml.safe_dump(experiment.config, sort_keys=False, allow_unicode=True, default_flow_style=None)
        if experiment.config
        else "",
        "notes": list(map(str, experiment.facts.get("notes") or [])),
    }
