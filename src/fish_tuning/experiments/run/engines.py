"""Engines that do an experiment's runs: this process, or workers on a Ray cluster."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fish_tuning.errors import ConfigurationError, FishTuningError
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.extensions import load_extensions
from fish_tuning.experiments.config.secrets import remember_all, remembered
from fish_tuning.experiments.run.launch import ALONE, Launch
from fish_tuning.experiments.run.locks import MOST_DEATHS
from fish_tuning.experiments.run.progress import RunProgress
from fish_tuning.experiments.run.shards import WHOLE, Shard

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fish_tuning.experiments.run.plan import Plan

ENGINES = ("here", "ray")
POLL_SECONDS = 2.0


def check_engine(engine: str, workers: int | None = None, launch: Launch = ALONE) -> None:
    """Refuse an engine that is not known, not installed, or not for this launch, and workers where there are none."""
    if engine not in ENGINES:
        raise ConfigurationError(f"--engine {engine}: allowed are {', '.join(ENGINES)}.")
    if engine == "here" and workers is not None:
        raise ConfigurationError(
            f"--workers {workers}: the engine here has none. Add --engine ray, or start the same command several times."
        )
    if engine == "ray":
        if launch.number > 1:
            raise ConfigurationError(
                f"--engine ray: this is {launch}, which torchrun or accelerate has started to train each run together; "
                "ray gives whole runs to its workers. Leave out one of the two."
            )
        _ray()


def run_on_ray(
    config: ExperimentConfig,
    plan: Plan,
    workers: int | None = None,
    shard: Shard = WHOLE,
    since: float | None = None,
    extensions: Sequence[str] = (),
    shows_progress: bool = True,
) -> None:
    """Do the runs of an experiment on a Ray cluster: the one at RAY_ADDRESS, else one on this machine.

    Every worker is a process that takes runs no other is at, just as several commands on one folder do; so the output
    folder must be one that all nodes see, and so must local data and models. A worker that dies gives its run back, and
    Ray starts another in its place; a run that kills two is written down as failed. A worker has one GPU where the
    cluster has any, else an equal share of the CPUs.

    Args:
        config: the experiment.
        plan: from `plan_experiment(config)`.
        workers: how many; by default one a GPU, else one a CPU.
        shard: the part of the runs to do.
        since: see `run_experiment`.
        extensions: modules that register what the experiment names; workers import them too.
        shows_progress: see `run_experiment`.

    Raises:
        FishTuningError: workers died more often than their runs can explain.
    """
    ray = _ray()
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    resources: Mapping[str, float] = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    number = workers or gpus or cpus
    share = {"num_gpus": 1, "num_cpus": 1} if gpus else {"num_cpus": max(1, cpus // number)}
    folder = Path(config.training.output_dir).absolute()
    data = config.model_dump(mode="json")
    data["training"]["output_dir"] = str(folder)
    runs = len(shard.part(plan.arms, config.seeds))
    # Each run may kill MOST_DEATHS workers; who dies more often does not die of a run.
    work = ray.remote(max_retries=MOST_DEATHS * runs + 1, **share)(_work)
    began = time.time() if since is None else since
    tasks = [work.remote(data, shard, began, remembered(), list(extensions)) for _ in range(number)]
    with RunProgress(runs, shown=shows_progress) as progress:
        before = _written(folder)
        while tasks:
            done, tasks = ray.wait(tasks, timeout=POLL_SECONDS)
            try:
                ray.get(done)  # raises what a worker could not handle
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
                raise FishTuningError(f"--engine ray: workers die again and again: {error}") from error
            now = _written(folder)
            for _ in now - before:  # records that were there, of failures or of other settings, are written anew
                progress.finish()
            before = now


def _work(
    data: dict[str, Any], shard: tuple[int, int], since: float, secrets: Mapping[str, str], extensions: Sequence[str]
) -> None:
    """One worker: the same as another `fish-tuning run` on the folder."""
    load_extensions(extensions)
    remember_all(secrets)
    from fish_tuning.experiments.run.plan import plan_experiment
    from fish_tuning.experiments.run.runner import run_experiment

    config = ExperimentConfig.model_validate(data)
    run_experiment(config, plan_experiment(config), shard=Shard(*shard), since=since, shows_progress=False)


def _written(folder: Path) -> set[tuple[str, float]]:
    return {(path.name, path.stat().st_mtime) for path in (folder / "runs").glob("*.json")}


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigurationError(
            "--engine ray needs the package ray; install it with pip install 'fish-tuning[ray]'."
        ) from error
    return ray
