"""Each arm and seed is a run of the logger's: first of a logger that is none, then of those that are installed."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from recorder import Recorder
from transformers import Trainer

from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.run import arguments
from fish_tuning.experiments.run import arm as arms
from fish_tuning.experiments.run.context import Context
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.runner import run_experiment

MakeExperiment = Callable[..., ExperimentConfig]
Report = Callable[..., list[RunRecord]]
NAMES = {"trainable_parameters", "keep_ratio", "fisher_seconds"}
TWO_ARMS = "fish_tuning.methods_to_run=[lora, lora-fish]"


@pytest.fixture
def report(experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> Report:
    """`report(logger, "key=value", ...)`: the records of an experiment of two arms that reports to a logger."""

    def run(logger: str, *overrides: str) -> list[RunRecord]:
        found = arguments.get_available_reporting_integrations()
        monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: [*found, "recorder"])
        config = experiment(TWO_ARMS, f"training.args_override.report_to={logger}", *overrides)
        return run_experiment(config, plan_experiment(config))

    return run


def figures(record: RunRecord) -> dict[str, float]:
    return {name: value for name in NAMES if (value := getattr(record, name)) is not None}


def break_evaluation(monkeypatch: pytest.MonkeyPatch, arm: str) -> None:
    evaluate = arms.evaluate

    def broken(context: Context, trainer: Trainer) -> dict[str, float]:
        if str(trainer.args.run_name).endswith(f"-{arm}-seed1"):
            raise RuntimeError("it broke")
        return evaluate(context, trainer)

    monkeypatch.setattr(arms, "evaluate", broken)


def test_each_arm_and_seed_is_one_run_from_its_figures_to_its_evaluation(
    report: Report, recorders: list[Recorder]
) -> None:
    records = report("recorder", "seeds=[1, 2]", "fish_tuning.warmup_steps=2", "training.learning_rates=[0.01, 0.02]")
    runs = {run.name: run for run in recorders}
    assert runs.keys() == {f"small-{record.arm}-seed{record.seed}" for record in records}
    assert len(recorders) == len(records) == 4  # and none of a warm-up or a trial
    for record in records:
        run = runs[f"small-{record.arm}-seed{record.seed}"]
        assert run.first == figures(record)
        assert run.first.keys() == (NAMES if record.arm == "lora-fish" else NAMES - {"keep_ratio"})
        assert run.logs[-1]["eval_accuracy"] == record.metrics["accuracy"]
        assert [event for event, *_ in run.events if event != "log"] == ["begin", "end"]
        assert run.events[-1][0] == "end"


def test_a_run_that_fails_is_closed(report: Report, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    break_evaluation(monkeypatch, "lora")
    assert [record.status for record in report("recorder")] == ["failed", "ok"]
    assert [[event for event, *_ in run.events].count("end") for run in recorders] == [1, 1]


def test_a_logger_that_cannot_be_closed_costs_no_run(
    report: Report, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(Recorder, "on_train_end", unreachable)
    assert [record.status for record in report("recorder")] == ["ok", "ok"]
    assert "The logs of small-lora-seed1 could not be closed: no network" in caplog.text


def test_a_run_name_of_ones_own_stands_in_for_the_experiments(report: Report, recorders: list[Recorder]) -> None:
    report("recorder", "training.args_override.run_name=mine")
    assert [run.name for run in recorders] == ["mine-lora-seed1", "mine-lora-fish-seed1"]


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard: pip install tensorboard"
    )
    written = events.EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in written.Scalars(tag)] for tag in written.Tags()["scalars"]}


def assert_in_tensorboard(record: RunRecord, folder: Path) -> None:
    scalars = tensorboard_scalars(folder)
    for name in NAMES:
        value = figures(record).get(name)
        assert scalars.get(f"train/{name}") == (None if value is None else [(0, pytest.approx(value))])
    assert scalars["eval/accuracy"][-1][1] == pytest.approx(record.value)


def test_tensorboard_keeps_the_last_configurations_logs(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorboard_scalars(tmp_path)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    for patience in (1, 2):  # with which checkpoints are made and removed
        records = report("tensorboard", f"training.early_stopping_patience={patience}")
    for record in records:
        assert_in_tensorboard(record, tmp_path / "results" / "logs" / f"{record.arm}-seed{record.seed}")
    assert not list((tmp_path / "results").glob("checkpoints/*"))


def test_tensorboard_in_a_folder_of_ones_own(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensorboard_scalars(tmp_path)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "all"))
    for record in report("tensorboard"):
        assert_in_tensorboard(record, tmp_path / "all" / f"small-{record.arm}-seed{record.seed}")
    assert not (tmp_path / "results" / "logs").exists()
    report(
        "tensorboard", "training.args_override.run_name=../../mine", "fish_tuning.methods_to_run=[lora]", "seeds=[2]"
    )
    assert (tmp_path / "all" / ".._.._mine-lora-seed2").is_dir()


@pytest.mark.slow
def test_wandb(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs wandb: pip install wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    records = report("wandb")
    assert wandb.run is None
    written = [path.read_bytes() for path in tmp_path.glob("wandb/offline-run-*/*.wandb")]
    assert len(written) == len(records) == 2
    for record in records:
        (text,) = [text for text in written if f"small-{record.arm}-seed{record.seed}".encode() in text]
        assert all((f"train/{name}".encode() in text) == (name in figures(record)) for name in NAMES)
        assert b"eval/accuracy" in text


@pytest.mark.slow
def test_mlflow(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow: pip install mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    break_evaluation(monkeypatch, "lora-fish")
    (dense, _) = report("mlflow")
    assert mlflow.active_run() is None
    runs = {run.info.run_name: run for run in mlflow.MlflowClient().search_runs(["0"])}
    states = {name: run.info.status for name, run in runs.items()}
    assert states == {"small-lora-seed1": "FINISHED", "small-lora-fish-seed1": "FAILED"}
    told = runs["small-lora-seed1"].data.metrics
    assert told.items() >= {**figures(dense), "eval_accuracy": dense.value}.items()
    assert runs["small-lora-fish-seed1"].data.metrics.keys() >= NAMES


@pytest.mark.slow
def test_trackio(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when trackio is imported
    pytest.importorskip("trackio", reason="needs trackio: pip install trackio")
    records = report("trackio", "training.args_override.project=fish")
    with contextlib.closing(sqlite3.connect(tmp_path / "fish.db")) as database:
        rows = database.execute("SELECT run_name, metrics FROM metrics").fetchall()
    told = {run: "".join(str(metrics) for name, metrics in rows if name == run) for run, _ in rows}
    assert told.keys() == {f"small-{record.arm}-seed{record.seed}" for record in records}
    for record in records:
        text = told[f"small-{record.arm}-seed{record.seed}"]
        assert all((f"train/{name}" in text) == (name in figures(record)) for name in NAMES)
        assert "eval/accuracy" in text
