"""Runs on a local Ray cluster, with one worker killed in the middle."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from fish_tuning.errors import ConfigurationError, FishTuningError
from fish_tuning.experiments.config import secrets
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.run import engines
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.runner import run_experiment
from fish_tuning.experiments.run.shards import Shard

MakeExperiment = Callable[..., ExperimentConfig]


def test_an_unknown_engine_and_a_missing_package_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engines.check_engine("here")
    with pytest.raises(ConfigurationError, match="--engine slurm: allowed are here, ray"):
        engines.check_engine("slurm")
    with pytest.raises(ConfigurationError, match="--workers 2: the engine here has none"):
        engines.check_engine("here", workers=2)
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


class Ray:
    """As much of Ray as the engine uses, in this process; every task comes to its end at once, or raises."""

    class exceptions:  # as Ray calls it
        class WorkerCrashedError(Exception): ...

        class OutOfMemoryError(Exception): ...

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.options, self.calls = error, {}, []  # type: ignore[var-annotated]

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def remote(self, **options: object) -> Callable[..., object]:
        self.options = options
        return lambda work: SimpleNamespace(remote=lambda *arguments: self.calls.append(arguments))

    def wait(self, tasks: list[object], timeout: float) -> tuple[list[object], list[object]]:
        return tasks, []

    def get(self, tasks: list[object]) -> None:
        if self.error is not None:
            raise self.error


def test_workers_get_the_shard_and_no_run_kills_them_for_ever(
    experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, ray = experiment("fish_tuning.methods_to_run=[lora, lora-fish]", "seeds=[1, 2, 3]"), Ray()
    monkeypatch.setattr(engines, "_ray", lambda: ray)
    monkeypatch.setattr(secrets, "_values", {"hf_secret": "${TOKEN}"})
    engines.run_on_ray(config, plan_experiment(config), 2, Shard(2, 3), 7.0, ("my_module",))
    assert [(*call[1:3], call[4]) for call in ray.calls] == [((2, 3), 7.0, ["my_module"])] * 2
    assert all(call[3]["hf_secret"] == "${TOKEN}" for call in ray.calls)
    assert ray.options["max_retries"] == 2 * 2 + 1  # two runs in this shard, of which each may kill two workers


def test_runs_that_are_done_anew_count_too(
    experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = tmp_path / "results" / "runs" / "lora-seed1.json"
    written.parent.mkdir(parents=True)
    written.write_text("{}")
    os.utime(written, (1, 1))

    class Rewrites(Ray):
        def wait(self, tasks: list[object], timeout: float) -> tuple[list[object], list[object]]:
            written.write_text("{}")
            return super().wait(tasks, timeout)

    finished: list[None] = []
    monkeypatch.setattr(engines, "_ray", Rewrites)
    monkeypatch.setattr(engines.RunProgress, "finish", lambda _: finished.append(None))
    config = experiment("fish_tuning.methods_to_run=[lora]")
    engines.run_on_ray(config, plan_experiment(config), 1)
    assert len(finished) == 1


def test_workers_do_their_shard_alone(experiment: MakeExperiment, tmp_path: Path) -> None:
    config = experiment("fish_tuning.methods_to_run=[lora, lora-fish]")
    engines._work(config.model_dump(mode="json"), (2, 2), time.time(), {}, [])
    assert [path.stem for path in (tmp_path / "results" / "runs").iterdir()] == ["lora-fish-seed1"]


def test_workers_that_die_of_no_run_are_told(experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    config, ray = experiment(), Ray(Ray.exceptions.WorkerCrashedError("it died"))
    monkeypatch.setattr(engines, "_ray", lambda: ray)
    with pytest.raises(FishTuningError, match="--engine ray: workers die again and again: it died"):
        engines.run_on_ray(config, plan_experiment(config))
