"""The page: what the template shows, put together from the results."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from os.path import commonprefix
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fish_tuning import __version__
from fish_tuning.experiments.config.arm_names import ArmName
from fish_tuning.experiments.report.page import words
from fish_tuning.experiments.report.page.costs import Cost, costs
from fish_tuning.experiments.report.page.curves import curves, mean_curve
from fish_tuning.experiments.report.page.forest import Words, bars, forest, spoken_bounds, spoken_difference
from fish_tuning.experiments.report.page.heat import Shares, colour, factor_shares, heat_map, mean_shares, percent
from fish_tuning.experiments.report.page.load import Experiment
from fish_tuning.experiments.report.page.marks import Look, looks, mark
from fish_tuning.experiments.report.page.masks import agreements, joined
from fish_tuning.experiments.report.page.results import Family, Results, Score
from fish_tuning.experiments.report.page.scatter import Point, scatter
from fish_tuning.experiments.report.page.svg import element
from fish_tuning.experiments.report.tables import fact_text

WIDE, NARROW, PANEL = 700, 330, 330
_TO_DENSE = Words("Difference to the dense arm", "dense arm better", "this arm better")
_OF_CHOICE = Words("Difference to other choices at the same budget", "other choice better", "Fisher better")


@dataclass(frozen=True)
class Figure:
    """One picture, drawn once or for two widths."""

    title: str
    wide: Markup
    narrow: Markup | None = None


def html_page(results: Results, experiments: Sequence[Experiment], notes: Sequence[str]) -> str:
    """The whole page as one file, with style and pictures in it."""
    from jinja2 import Environment, StrictUndefined

    here = Path(__file__).parent
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((here / "page.html").read_text(encoding="utf-8"))
    overlaps, unread = agreements(experiments)
    look = looks(results.arms)
    shares = {arm: found for arm in results.arms if (found := mean_shares(results.of_arm(arm)))}
    return template.render(
        results=results,
        experiments=[_settings(experiment) for experiment in experiments],
        notes=[*notes, *unread],
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        title=_title(experiments),
        columns=[*results.tasks, *(["average"] if results.averages else [])],
        dashes=any(not (each.values or each.n_failed or each.n_missing) for each in results.scores.values()),
        cells={arm: _cells(results, arm) for arm in results.arms},
        legend=_legend(look),
        scatters=_scatters(results, look),
        differences=_forest(results.to_dense, look, _TO_DENSE),
        choices=_forest(results.of_choice, look, _OF_CHOICE),
        curves=_curves(results, look),
        heats=_heats(shares),
        budgets=len(set(look.values())) < len(look),
        scale=[Markup("rgb({},{},{})").format(*colour(step / 20)) for step in range(21)],
        factors=_factors(results),
        overlaps=joined(overlaps),
        overlaps_apart=overlaps,
        costs=(measured := costs(results)),
        bars=_bars(measured),
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


def _legend(look: Mapping[str, Look]) -> list[tuple[str, Markup]]:
    """Each mark once; arms that only differ by their budget share one, as `lora-fish@0.1, @0.5`."""
    arms: dict[Look, list[str]] = {}
    for arm, each in look.items():
        arms.setdefault(each, []).append(arm)
    return [
        (
            ", ".join([first, *(f"@{name.budget}" if (name := ArmName.parse(arm)).budget else arm for arm in others)]),
            _swatch(each),
        )
        for each, (first, *others) in arms.items()
    ]


def _swatch(look: Look) -> Markup:
    return element(
        "svg", mark(8, 8, look), viewBox="0 0 16 16", width=16, height=16, aria_hidden="true", class_="swatch"
    )


def _scatters(results: Results, look: dict[str, Look]) -> list[Figure]:
    """Of the average and of each task; a single one is drawn large."""
    named: list[tuple[str, str, dict[str, Score]]] = [
        (task, results.metrics.get(task, "metric"), {arm: results.scores[arm, task] for arm in results.arms})
        for task in results.tasks
    ]
    if any(score.mean is not None for score in results.averages.values()):
        named.insert(0, ("average over tasks", "mean of the metrics", results.averages))
    figures: list[Figure] = []
    for name, metric, scores in named:
        points = [
            Point(arm, size[1], scores[arm])
            for arm in results.arms
            if (size := results.parameters(arm)) and scores[arm].mean is not None
        ]
        if points:
            title = f"{name}: {metric.replace('_', ' ')}"
            large = scores is results.averages or len(named) == 1
            wide = scatter(points, look, title, metric, WIDE if large else PANEL, 340 if large else 250)
            narrow = scatter(points, look, title, metric, NARROW, 300) if large else None
            figures.append(Figure(title, wide, narrow))
    return figures


def _forest(family: Family, look: dict[str, Look], title: Words) -> Figure | None:
    if not any(each.mean_difference is not None for each in family.overall):
        return None
    names = [words.row_name(each) for each in family.overall]
    wide, narrow = (forest(family.overall, names, look, width, title) for width in (WIDE, NARROW))
    return Figure(title.title, wide, narrow)


def _curves(results: Results, look: dict[str, Look]) -> list[Figure]:
    figures = []
    for task in results.tasks:
        drawn = {
            arm: curve
            for arm in results.arms
            if (curve := mean_curve([run for run in results.of_arm(arm) if run.task == task]))
        }
        if drawn:
            title = f"{task}: training loss"
            alone = len(results.tasks) == 1
            narrow = curves(drawn, look, title, NARROW)
            figures.append(
                Figure(task, curves(drawn, look, title, WIDE, 320), narrow) if alone else Figure(task, narrow)
            )
    return figures


def _heats(shares: Mapping[str, Shares]) -> list[tuple[str, float, list[Figure]]]:
    """The maps by budget, each budget with the share that its scale ends with: next to a large one all else is dark."""
    budgets: dict[str, dict[str, Shares]] = {}
    for arm, each in shares.items():
        budgets.setdefault(ArmName.parse(arm).budget, {})[arm] = each
    tops = {budget: max(max(each.values()) for each in arms.values()) for budget, arms in budgets.items()}
    return [
        (budget, tops[budget], [_heat(arm, each, tops[budget]) for arm, each in arms.items()])
        for budget, arms in budgets.items()
    ]


def _heat(arm: str, shares: Shares, top: float) -> Figure:
    return Figure(arm, heat_map(shares, f"Share of entries that {arm} keeps", top))


def _factors(results: Results) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    found = {arm: factor_shares(results.of_arm(arm)) for arm in results.arms}
    return [(arm, factors) for arm, factors in found.items() if {"A", "B"} <= factors.keys()]


def _bars(measured: Sequence[Cost]) -> Figure | None:
    rows = [(cost.arm, cost.scoring or 0.0, cost.training) for cost in measured if cost.training is not None]
    return Figure("Time of one run", bars(rows, WIDE), bars(rows, NARROW)) if rows else None


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
