"""Which runs are pairs: one task, one seed, one setting. Pure functions of run records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fish_tuning.experiments.config.arm_names import ArmName
from fish_tuning.experiments.records.run_record import RunRecord


@dataclass
class Pairs:
    """The paired differences of an arm and its baseline, by task, and what keeps tasks from having any."""

    by_task: dict[str, list[float]] = field(default_factory=dict)
    metrics: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)  # where only one of the two ran, or no seed finished in both
    conflicts: list[str] = field(default_factory=list)  # where runs differ in more than their seeds and arms


def unique_runs(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The finished runs, each once: the same key is the same run, however often its folder was copied.

    Experiments that share a run are copies of one another, whatever they are called: they count as one.
    """
    finished = [run for run in runs if run.status == "ok" and run.value is not None and math.isfinite(run.value)]
    first: dict[tuple[object, ...], RunRecord] = {}
    named: dict[str, str] = {}  # experiments that are copies, and what they count as
    for run in finished:
        known = first.setdefault(_key(run), run)
        if known.experiment != run.experiment:
            named.setdefault(run.experiment, named.get(known.experiment, known.experiment))
    return [replace(run, experiment=named.get(run.experiment, run.experiment)) for run in first.values()]


def _key(run: RunRecord) -> tuple[object, ...]:
    contents = run.config_hash or (run.experiment, run.model, run.metric, run.value)
    return run.task, run.arm, run.seed, contents


def setting_of(run: RunRecord) -> tuple[str, ...]:
    """What a run has in common with further seeds of it; of older records, which do not say, the experiment's name."""
    return (run.setting, run.model) if run.setting else ("", run.model, run.experiment)


def paired(runs: Sequence[RunRecord], arm: str, baseline: str) -> Pairs:
    """The pairs of two arms, from `unique_runs`.

    Two runs are a pair when they belong to one experiment and differ in their arms alone. A task whose pairs are of
    several settings (another model, data, length of training, ...) has none: they are not further seeds of each other.
    """
    pairs = Pairs()
    for task in sorted({run.task for run in runs if run.arm in (arm, baseline)}):
        here = [run for run in runs if run.task == task]
        ours, theirs = ([run for run in here if run.arm == name] for name in (arm, baseline))
        matched = [(one, other) for one in ours for other in theirs if _belong_together(one, other)]
        seeds = [one.seed for one, _ in matched]
        settings = {(setting_of(one), setting_of(other)) for one, other in matched}
        alike = all(_share_settings(one, other) for one, other in matched)
        if len(settings) > 1 or len(set(seeds)) < len(seeds) or not alike:
            pairs.conflicts.append(task)
        elif matched:
            matched.sort(key=_seed)
            pairs.by_task[task] = [(one.value or 0.0) - (other.value or 0.0) for one, other in matched]
            pairs.metrics |= {one.metric for one, _ in matched}
        else:
            pairs.missing.append(task)
    return pairs


def _seed(pair: tuple[RunRecord, RunRecord]) -> int:
    return pair[0].seed


def _belong_together(one: RunRecord, other: RunRecord) -> bool:
    """Runs of one seed of one experiment, in which all arms have the same data in the same order."""
    mine, theirs = ((run.seed, run.experiment, run.model, run.metric) for run in (one, other))
    return mine == theirs


def _share_settings(one: RunRecord, other: RunRecord) -> bool:
    """Whether two runs differ in their arms alone; methods may have training arguments and rates of their own."""
    methods = {ArmName.parse(run.arm).method for run in (one, other)}
    return one.common == other.common and (len(methods) > 1 or one.method_own == other.method_own)
