"""The experiments in and below some folders, as far as they can be read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fish_tuning.errors import ConfigurationError, RecordError, did_you_mean_beside
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.report.page.shared import settled, with_common
from fish_tuning.files.sealed_json import read_sealed

_NOT_SEARCHED = ("adapters", "checkpoints", "locks", "runs", "selection")


@dataclass(frozen=True)
class Experiment:
    """What one folder holds; `config` and `facts` are empty where results.json is missing."""

    folder: Path
    name: str
    runs: tuple[RunRecord, ...]
    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    planned: tuple[tuple[str, int], ...] = ()  # arm and seed; empty where the plan is not known

    @property
    def missing(self) -> list[tuple[str, int]]:
        """Planned runs that left no record."""
        done = {(run.arm, run.seed) for run in self.runs}
        return [run for run in self.planned if run not in done]


def finished(run: RunRecord) -> bool:
    return run.status == "ok" and run.value is not None and math.isfinite(run.value)


def read_experiments(folders: Sequence[Path]) -> tuple[list[Experiment], list[str]]:
    """All experiments, in the order of `folders` and then of their paths, and notes on what could not be read."""
    notes: list[str] = []
    found: dict[Path, Experiment] = {}
    for folder in folders:
        if not folder.is_dir():
            state = "is not a folder" if folder.exists() else "does not exist"
            raise ConfigurationError(
                f"report: {folder} {state}; name the output folder of an experiment.{did_you_mean_beside(folder)}"
            )
        before = len(notes)
        below = [read_experiment(path, notes) for path in _experiment_folders(folder)]
        if not any(experiment.runs for experiment in below):
            torn = "".join(f"\n  {note}" for note in notes[before:])
            raise ConfigurationError(
                f"report: no readable run in {folder}; an experiment folder has runs/*.json or results.json.{torn}"
            )
        found |= {experiment.folder.resolve(): experiment for experiment in below if experiment.runs}
    return _settled(list(found.values())), notes


def _settled(experiments: Sequence[Experiment]) -> list[Experiment]:
    runs = iter(settled([run for experiment in experiments for run in experiment.runs]))
    return [replace(each, runs=tuple(next(runs) for _ in each.runs)) for each in experiments]


def read_experiment(folder: Path, notes: list[str]) -> Experiment:
    """One experiment; what cannot be read is left out and told in `notes`."""
    results = _read_results(folder / "results.json", notes)
    config, facts = _mapping(results.get("config")), _mapping(results.get("facts"))
    files = sorted((folder / "runs").glob("*.json"))
    listed = results.get("runs")
    parts = [_read_record(path, notes) for path in files] if files else listed if isinstance(listed, list) else []
    sources = [str(path) for path in files] or [f"{folder / 'results.json'}, run {n}" for n, _ in enumerate(parts, 1)]
    runs = [run for data, source in zip(parts, sources, strict=True) if (run := _record(data, source, notes))]
    planned = _planned(config, facts)
    if not planned:
        notes.append(f"{_why_no_plan(folder, config)}, so it is not known whether runs are missing: {folder}.")
    name = str(results.get("experiment") or config.get("name") or (runs and runs[0].experiment) or folder.name)
    if files and isinstance(listed, list):
        notes += _leftovers(folder, runs, listed)
    order = {arm: position for position, arm in enumerate(dict.fromkeys(arm for arm, _ in planned))}
    runs.sort(key=lambda run: (order.get(run.arm, len(order)), run.arm if run.arm not in order else "", run.seed))
    runs = with_common([_completed(run, name, config, facts) for run in runs], folder, listed, config, facts)
    return Experiment(folder, name, tuple(runs), config, facts, planned)


def _experiment_folders(top: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(top):
        if "results.json" in files or ("runs" in folders and any(Path(path, "runs").glob("*.json"))):
            yield Path(path)
        folders[:] = sorted(name for name in folders if name not in _NOT_SEARCHED and not name.startswith("."))


def _read_results(path: Path, notes: list[str]) -> dict[str, Any]:
    return _mapping(_read_json(path, notes)) if path.is_file() else {}


def _why_no_plan(folder: Path, config: dict[str, Any]) -> str:
    if config:
        return "The configuration stored there is not one of this version"
    there = (folder / "results.json").is_file()
    return "Its results.json holds no configuration that can be read" if there else "There is no results.json"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_json(path: Path, notes: list[str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "torn, or not JSON"
        notes.append(f"{path} was left out: {reason}.")
        return None


def _read_record(path: Path, notes: list[str]) -> Any:
    """One run's file; what its checksum does not vouch for is left out, what has none is of an earlier version."""
    try:
        return read_sealed(path)[0]
    except RecordError as error:
        notes.append(f"{str(error).removesuffix('.')}; it was left out.")
    except OSError as error:
        notes.append(f"{path} was left out: {error.strerror}.")
    return None


def _record(data: Any, source: str, notes: list[str]) -> RunRecord | None:
    if data is None:  # told already
        return None
    try:
        # Where results.json stands for the files, a loss that was not finite is null.
        curve = [point for point in data.get("loss_curve") or [] if None not in point]
        run = RunRecord.from_dict(data | {"loss_curve": curve})
        return _kinds().validate_python(asdict(run))
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError):  # pydantic's are ValueErrors
        notes.append(f"{source} was left out: it is not the record of a run.")
        return None


@cache
def _kinds() -> TypeAdapter[RunRecord]:
    """Tells whether every field is of the kind that a record has there."""
    return TypeAdapter(RunRecord)


def _completed(run: RunRecord, name: str, config: dict[str, Any], facts: dict[str, Any]) -> RunRecord:
    """Older records do not say their experiment, task and model: those of the folder."""
    model = _mapping(config.get("model")).get("name")
    return replace(
        run,
        experiment=run.experiment or name,
        task=run.task or str(facts.get("task") or name),
        model=run.model or str(model or ""),
    )


def _planned(config: dict[str, Any], facts: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    """Every planned arm with every seed, from the stored facts and configuration."""
    from pydantic import ValidationError

    from fish_tuning.experiments.config.experiment import ExperimentConfig

    try:
        known = ExperimentConfig.model_validate(config)
    except (ValidationError, RecursionError):  # of another version, or none
        return ()
    stored = facts.get("arms")
    arms = [str(arm) for arm in stored] if isinstance(stored, list) and stored else known.arms
    return tuple((arm, seed) for arm in arms for seed in known.seeds)


def _leftovers(folder: Path, runs: Sequence[RunRecord], listed: Sequence[Any]) -> list[str]:
    """results.json lists the runs of its configuration; a file that it lacks may come from an earlier one."""
    known = {(run.get("arm"), run.get("seed"), run.get("config_hash", "")) for run in listed if isinstance(run, dict)}
    strange = [run for run in runs if (run.arm, run.seed, run.config_hash) not in known]
    if not strange:
        return []
    names = ", ".join(f"{run.arm} seed {run.seed}" for run in strange[:4]) + (", ..." if len(strange) > 4 else "")
    return [
        f"{len(strange)} of {len(runs)} runs in {folder} are not in its results.json and may come from another "
        f"configuration: {names}."
    ]
