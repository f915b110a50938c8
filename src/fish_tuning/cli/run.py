"""`fish-tuning run`."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from fish_tuning.cli.application import (
    FAILED,
    INTERRUPTED,
    OK,
    ConfigArgument,
    ExtensionOption,
    app,
    errors_told,
    quiet_libraries,
    renamings_untold,
    tell,
)
from fish_tuning.cli.output import Output, library_log, stdout_kept

if TYPE_CHECKING:
    from fish_tuning.experiments.config.experiment import ExperimentConfig
    from fish_tuning.experiments.run.launch import Launch
    from fish_tuning.experiments.run.plan import Plan
    from fish_tuning.experiments.run.shards import Shard


class How(NamedTuple):
    """How an experiment is run; the options of `fish-tuning run`."""

    dry_run: bool = False
    shard: str | None = None
    engine: str = "here"
    workers: int | None = None
    extensions: tuple[str, ...] = ()
    quiet: bool = False
    verbose: bool = False
    as_json: bool = False


HERE = How()


@app.command()
def run(
    config: ConfigArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to the file, e.g. seeds=[1,2,3] lora.fish_rank=8."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what each arm would train, and train nothing.")
    ] = False,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Do only the I-th of N parts of the runs, e.g. 1/4.")
    ] = None,
    engine: Annotated[str, typer.Option(help="What does the runs: here, or workers on a ray cluster.")] = "here",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers of the engine; by default one a GPU, else one a CPU.")
    ] = None,
    extension: ExtensionOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Tell nothing but errors.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell on standard error what the library does.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON document on standard output at the end; all else on standard error."),
    ] = False,
) -> None:
    """Run an experiment: every arm with every seed.

    It ends with a table of results, pictures and a table of differences. Started again, or on several machines with one
    output folder, it goes on with what is not finished.

    Exit code: 0 all runs finished, 1 a run failed, 2 the configuration cannot work, 130 interrupted.
    """
    how = How(dry_run, shard, engine, workers, tuple(extension or ()), quiet, verbose, as_json)
    raise typer.Exit(run_command(config, overrides or [], how))


def run_command(config: str, overrides: list[str], how: How = HERE) -> int:
    """What `fish-tuning run` and `scripts/run_experiment.py` both do. Returns the exit code."""
    quiet_libraries()
    from fish_tuning.errors import ConfigurationError, MaskError
    from fish_tuning.experiments.run.launch import this_launch

    signal.signal(signal.SIGTERM, _interrupt)  # batch systems stop a job with it
    launch = this_launch()
    if launch.number > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's advice comes once a run and process
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # every process scores, so every one needs the weights
    told = launch.leads and not how.quiet  # process 0 tells what the others would
    try:
        with (
            errors_told(
                "What is finished is kept; make room, and the same command goes on.",
                interrupted="interrupted before the first run",
                wrong_use=(ConfigurationError, MaskError),
                launch=launch,
            ),
            renamings_untold(FutureWarning if told else Warning),
            library_log(how.verbose, told),
            stdout_kept(how.as_json) as out,
        ):
            return _run(config, overrides, how, launch, Output(how.quiet, how.as_json, out))
    except typer.Exit as ended:
        return ended.exit_code


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _run(config_name: str, overrides: list[str], how: How, launch: Launch, output: Output) -> int:
    from fish_tuning.errors import ConfigurationError
    from fish_tuning.experiments.config.extensions import load_extensions
    from fish_tuning.experiments.config.loading import load_experiments

    if how.quiet and how.verbose:
        raise ConfigurationError("--quiet and --verbose cannot go together; leave one of them out.")
    load_extensions(how.extensions)
    experiments = load_experiments(config_name, overrides)  # before torch is imported: a wrong key is told at once

    from fish_tuning.experiments.models.building import check_weights
    from fish_tuning.experiments.models.quantized import check_installed
    from fish_tuning.experiments.run.engines import check_engine
    from fish_tuning.experiments.run.launch import check_launch
    from fish_tuning.experiments.run.plan import plan_experiment
    from fish_tuning.experiments.run.shards import parse_shard

    shard = parse_shard(how.shard)
    check_engine(how.engine, how.workers, launch)
    planned = []
    for config in experiments:  # all of them, before the first is run
        check_launch(config, launch)
        planned.append((config, plan_experiment(config)))
        if how.dry_run and launch.leads:
            output.plan(*planned[-1])
        elif not how.dry_run:
            check_weights(config.model)
            check_installed(planned[-1][1].quantization)
    if not launch.leads:
        return OK if how.dry_run else _follow(planned)
    code = OK if how.dry_run else max(_run_one(config, plan, how, shard, launch, output) for config, plan in planned)
    output.finish()
    return code


def _follow(planned: list[tuple[ExperimentConfig, Plan]]) -> int:
    """What every process of a launch but the first does: train along."""
    from fish_tuning.experiments.run.runner import run_experiment

    for config, plan in planned:
        try:
            run_experiment(config, plan)
        except KeyboardInterrupt:
            return INTERRUPTED
    return OK


def _run_one(config: ExperimentConfig, plan: Plan, how: How, shard: Shard, launch: Launch, output: Output) -> int:
    from fish_tuning.experiments.run.engines import run_on_ray
    from fish_tuning.experiments.run.runner import run_experiment

    output_dir = _writable(Path(config.training.output_dir))
    part = f", part {shard.number} of {shard.of}" if shard.of > 1 else ""
    together = f", each on {launch.number} processes" if launch.number > 1 else ""
    output.tell(
        f"{config.name}: {config.model.name} on {config.dataset.source}, {len(plan.arms)} arms x "
        f"{len(config.seeds)} {'seed' if len(config.seeds) == 1 else 'seeds'}{part}{together}"
    )
    began, fingerprints = time.time(), dict[str, str]()
    try:
        if how.engine == "ray":
            run_on_ray(config, plan, how.workers, shard, began, how.extensions, not how.quiet)
        runs = run_experiment(
            config, plan, output.run, shard, began, not how.quiet, on_fingerprints=fingerprints.update
        )
    except KeyboardInterrupt:
        why = " (where one process ends, a launcher stops the others; its report says which)" if together else ""
        tell(f"interrupted{why}; finished runs are kept in {output_dir}, the same command goes on from there", err=True)
        raise typer.Exit(INTERRUPTED) from None
    output.results(config, plan, runs, output_dir, fingerprints)
    return FAILED if any(run.status == "failed" for run in runs) else OK


def _writable(folder: Path) -> Path:
    from fish_tuning.errors import ConfigurationError
    from fish_tuning.files.atomic import DISK_FULL

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise ConfigurationError(f"training.output_dir: cannot make the folder {folder}: {error.strerror}") from error
    return folder
