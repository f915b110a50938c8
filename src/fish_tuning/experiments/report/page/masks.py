"""How far the masks of an arm agree between seeds, and with the random mask of the same seed: from the mask files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from fish_tuning.errors import MaskError
from fish_tuning.experiments.config.arm_names import ArmName
from fish_tuning.experiments.report.page.load import Experiment

if TYPE_CHECKING:
    from fish_tuning.experiments.masks.mask_files import Inspected
    from fish_tuning.experiments.masks.overlaps import Overlap

MOST_SEEDS = 5  # ten pairs of masks; more would only cost time


@dataclass(frozen=True)
class Agreement:
    """Means over pairs of masks: Jaccard's index, and what masks of these sizes, drawn at random, would have."""

    experiment: str
    arm: str
    other: str  # "other seeds", or the random arm's name
    pairs: int
    jaccard: float
    by_chance: float
    by_chance_per_tensor: float  # drawn at random in each tensor, as many as these keep there


def agreements(experiments: Sequence[Experiment]) -> tuple[list[Agreement], list[str]]:
    """For every masked arm whose mask files are there, and notes on files that cannot be read."""
    found: list[Agreement] = []
    notes: list[str] = []
    for experiment in experiments:
        try:
            found += _of_experiment(experiment)
        except (MaskError, OSError, ValueError) as error:
            notes.append(f"Masks of {experiment.name} were left out of the overlaps: {error}")
    return found, notes


def joined(found: Sequence[Agreement]) -> list[Agreement]:
    """Over all experiments: the pairs added up, the indices as means, every experiment with the same weight."""
    groups: dict[tuple[str, str], list[Agreement]] = {}
    for each in found:
        groups.setdefault((each.arm, each.other), []).append(each)
    return [
        Agreement(
            "",
            *key,
            pairs=sum(each.pairs for each in members),
            jaccard=fmean(each.jaccard for each in members),
            by_chance=fmean(each.by_chance for each in members),
            by_chance_per_tensor=fmean(each.by_chance_per_tensor for each in members),
        )
        for key, members in groups.items()
    ]


def _of_experiment(experiment: Experiment) -> list[Agreement]:
    found: list[Agreement] = []
    for arm in dict.fromkeys(run.arm for run in experiment.runs if run.status == "ok" and run.kept):
        masks = _masks(experiment, arm)
        if not masks:
            continue
        from fish_tuning.experiments.masks.overlaps import overlap

        name = ArmName.parse(arm)
        among = [overlap(one, other) for one, other in combinations(masks.values(), 2)]
        found += _mean(experiment.name, arm, "other seeds", among)
        random = str(replace(name, suffix="fish-rand"))
        if arm != random:
            drawn = _masks(experiment, random, list(masks))
            across = [overlap(masks[seed], drawn[seed]) for seed in masks if seed in drawn]
            found += _mean(experiment.name, arm, random, across)
    return found


def _masks(experiment: Experiment, arm: str, seeds: Sequence[int] | None = None) -> dict[int, Inspected]:
    chosen = [run.seed for run in experiment.runs if run.arm == arm and run.status == "ok"][:MOST_SEEDS]
    paths = {seed: _path(experiment.folder, arm, seed) for seed in (chosen if seeds is None else seeds)}
    present = {seed: path for seed, path in paths.items() if path.is_file()}
    if not present:
        return {}
    from fish_tuning.experiments.masks.mask_files import read_mask  # imports torch: only where there are masks

    return {seed: read_mask(str(path)) for seed, path in present.items()}


def _path(folder: Path, arm: str, seed: int) -> Path:
    return folder / "adapters" / f"{arm}-seed{seed}" / "fish_mask.safetensors"


def _mean(experiment: str, arm: str, other: str, pairs: Sequence[Overlap]) -> list[Agreement]:
    if not pairs:
        return []
    jaccard, chance, per_tensor = (
        fmean(common / (sum(pair.kept) - common) for pair, common in zip(pairs, commons, strict=True))
        for commons in (
            [pair.both for pair in pairs],
            [pair.by_chance for pair in pairs],
            [pair.by_tensor for pair in pairs],
        )
    )
    return [Agreement(experiment, arm, other, len(pairs), jaccard, chance, per_tensor)]
