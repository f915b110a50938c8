"""Runs on a local Ray cluster, with one worker killed in the middle."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.run import engines
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.runner import run_experiment

MakeExperiment = Callable[..., ExperimentConfig]


def test_an_unknown_engine_and_a_missing_package_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engines.check_engine("here")
    with pytest.raises(ConfigurationError, match="--engine slurm: allowed are here, ray"):
        engines.check_engine("slurm")
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'fish-tuning\[ray\]'"):
        engines.check_engine("ray")


@pytest.fixture
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="the engine needs ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def kill_a_worker(runs: Path, killed: list[int], over: threading.Event) -> None:
    """Kill a worker once it is in the middle of the work: some runs are written, some are not."""
    while not over.is_set():
        if len(list(runs.glob("*.json"))) >= 1:
            for process in psutil.Process().children(recursive=True):
                if process.is_running() and "ray::_work" in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(process.pid)
                    return
        time.sleep(0.05)


@pytest.mark.slow
def test_a_cluster_does_every_run_though_a_worker_is_killed(
    cluster: None, experiment: MakeExperiment, tmp_path: Path
) -> None:
    arms = "fish_tuning.methods_to_run=[lora, lora-fish]"
    config = experiment(arms, "seeds=[1, 2]")
    killed: list[int] = []
    over = threading.Event()
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path / "results" / "runs", killed, over))
    killer.start()
    engines.run_on_ray(config, plan_experiment(config), workers=2)
    over.set()
    killer.join()
    assert killed
    known = []
    records = run_experiment(config, plan_experiment(config), lambda record, there: known.append(there))
    assert known == [True] * 4, "all was done by the workers"
    assert {record.status for record in records} == {"ok"}
    here = experiment(arms, "seeds=[1]", f"training.output_dir={tmp_path / 'here'}")
    alone = {record.arm: record.value for record in run_experiment(here, plan_experiment(here))}
    assert {record.arm: record.value for record in records if record.seed == 1} == alone
    assert json.loads((tmp_path / "results" / "results.json").read_text())["summary"]
