"""Which experiments share a column of the table: those on the same task and model, unless their runs contradict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath

from fish_tuning.experiments.compare.pairs import setting_of, unique_runs
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.report.page.load import Experiment, finished


def column_labels(experiments: Sequence[Experiment]) -> tuple[dict[Path, str], list[str]]:
    """The column of each experiment, by its folder, and notes.

    A column is a task. It is named with its model where a task ran on several, and with its experiment where two
    experiments differ in more than their seeds and arms: those are different settings, and are never mixed.
    """
    groups: dict[tuple[str, str], list[Experiment]] = defaultdict(list)
    for experiment in experiments:
        groups[_key(experiment)].append(experiment)
    tasks = [task for task, _ in groups]
    labels: dict[Path, str] = {}
    notes = []
    for (task, model), members in groups.items():
        within = [PurePath(model).name] if tasks.count(task) > 1 else []
        label = _label(task, within)
        if not _contradict(members):
            labels |= {member.folder: label for member in members}
            continue
        names = zip(members, _names(members), strict=True)
        labels |= {member.folder: _label(task, [*within, name]) for member, name in names}
        notes.append(
            f"{len(members)} experiments on {label} differ in more than their seeds and arms, so each has a column of "
            "its own."
        )
    return labels, notes


def _label(task: str, within: Sequence[str]) -> str:
    return f"{task} ({', '.join(within)})" if within else task


def _key(experiment: Experiment) -> tuple[str, str]:
    return experiment.runs[0].task, experiment.runs[0].model


def _contradict(members: Sequence[Experiment]) -> bool:
    """Whether experiments differ in more than their seeds and arms; a failed run says nothing."""
    runs = [run for member in members for run in member.runs if finished(run)]
    known: dict[tuple[str, int], RunRecord] = {}
    for run in runs:
        other = known.setdefault((run.arm, run.seed), run)
        if (other.value, other.metric, other.config_hash) != (run.value, run.metric, run.config_hash):
            return True
    settings: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for run in unique_runs([replace(run, task="") for run in runs]):
        settings[run.arm].add(setting_of(run))
    if len({run.metric for run in runs}) > 1 or len({run.common for run in runs}) > 1:
        return True
    return any(len(found) > 1 for found in settings.values())


def _names(members: Sequence[Experiment]) -> list[str]:
    """The experiments' names, or where these are equal the ends of their paths that tell them apart."""
    names = [member.name for member in members]
    depth = 0
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(member.folder.resolve().parts[-depth:]) for member in members]
    return names
