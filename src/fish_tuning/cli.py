"""The command line. Everything heavy is imported inside the command that needs it, so that --help answers at once."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from fish_tuning.cli_sharing import register as register_sharing

if TYPE_CHECKING:
    from rich.console import Console

    from fish_tuning.experiments.config.experiment import ExperimentConfig
    from fish_tuning.experiments.records.run_record import RunRecord
    from fish_tuning.experiments.run.launch import Launch
    from fish_tuning.experiments.run.plan import Plan
    from fish_tuning.experiments.run.shards import Shard

OK, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130

# Set before the libraries are imported; what the user has set stays.
_QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}

app = typer.Typer(
    name="fish-tuning",
    help="Compare LoRA with LoRA whose parameters are chosen by Fisher information.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class How(NamedTuple):
    """How an experiment is run; the options of `fish-tuning run`."""

    dry_run: bool = False
    shard: str | None = None
    engine: str = "here"
    workers: int | None = None
    extensions: tuple[str, ...] = ()


HERE = How()


MOST_OF_TITLE = 80  # characters


def _tell(text: str, *, err: bool = False) -> None:
    """Print what a terminal cannot take for a command, and without values that came from the environment."""
    from fish_tuning.experiments.config.secrets import scrubbed
    from fish_tuning.experiments.config.texts import visible

    typer.echo(visible(scrubbed(text)), err=err)


def _show_version(wanted: bool) -> None:
    if wanted:
        from fish_tuning import __version__

        _tell(f"fish-tuning {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="An experiment file, or the name of a shipped one.")],
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
    extension: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="A module or Python file of yours that registers what the file names."),
    ] = None,
) -> None:
    """Run an experiment: every arm with every seed.

    It ends with a table, pictures and a conclusion. Started again, or on several machines with one output folder, it
    goes on with what is not finished.

    Exit code: 0 all runs finished, 1 a run failed, 2 the configuration cannot work, 130 interrupted.
    """
    how = How(dry_run, shard, engine, workers, tuple(extension or ()))
    raise typer.Exit(run_command(config, overrides or [], how))


@app.command()
def configs() -> None:
    """List the shipped experiments."""
    from fish_tuning.experiments.config.loading import describe, shipped_experiments

    shipped = shipped_experiments()
    width = max(map(len, shipped), default=0)
    for name, path in shipped.items():
        _tell(f"{name:<{width}}  {describe(path)}")


@app.command()
def inspect(
    masks: Annotated[
        list[str],
        typer.Argument(metavar="MASK_OR_ADAPTER", help="Mask files, sparse deltas, adapter folders or checkpoints."),
    ],
    picture: Annotated[
        str | None, typer.Option("--picture", metavar="FILE.png", help="Draw layers by modules to this file.")
    ] = None,
) -> None:
    """Show where masks went: the kept entries by layer and module type, and how far several masks agree.

    Exit code: 0, 1 when the disk is full, or 2 when a file is missing, is something else, or cannot be compared.
    """
    from fish_tuning.errors import FishTuningError
    from fish_tuning.experiments.report.inspection import inspect_masks

    try:
        inspect_masks(_console(), masks, picture)
    except FishTuningError as error:
        _tell(f"error: {error}", err=True)
        raise typer.Exit(WRONG_USE) from None
    except OSError as error:
        raise typer.Exit(_told_full(error, "Make room, or draw to another disk.")) from None


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR", help="Output folders of experiments, or folders above them.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FOLDER", help="Where to write; the first DIR by default.")
    ] = None,
) -> None:
    """Join the runs of one or more experiments into one page: report.html, and its numbers as .md, .tex and .csv.

    Exit code: 0, 1 when the disk is full, or 2 when a folder is missing or has no run that can be read.
    """
    from fish_tuning.errors import FishTuningError
    from fish_tuning.experiments.report.page import write_page

    try:
        written, notes = write_page(folders, output)
    except FishTuningError as error:
        _tell(f"error: {error}", err=True)
        raise typer.Exit(WRONG_USE) from None
    except OSError as error:
        raise typer.Exit(_told_full(error, "Make room, or write elsewhere with --output.")) from None
    for note in notes:
        _tell(f"note: {note}")
    _tell(f"written: {', '.join(map(str, written))}")


register_sharing(app, _tell)


def main() -> None:
    """The `fish-tuning` command."""
    app()


def run_command(config: str, overrides: list[str], how: How = HERE) -> int:
    """What `fish-tuning run` and `scripts/run_experiment.py` both do. Returns the exit code."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # Where bitsandbytes is installed it warns of a faster kernel at every start, wanted or not.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from fish_tuning.errors import ConfigurationError, FishTuningError, MaskError
    from fish_tuning.experiments.run.launch import this_launch

    signal.signal(signal.SIGTERM, _interrupt)  # batch systems stop a job with it
    launch = this_launch()
    if launch.number > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's advice comes once a run and process
    if not launch.leads:
        logging.getLogger("fish_tuning").setLevel(logging.ERROR)  # process 0 tells the same
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                # What libraries will rename one day is nothing that a user of the command can act on.
                warnings.simplefilter("ignore", FutureWarning if launch.leads else Warning)
            return _run(config, overrides, how, launch)
    except FishTuningError as error:
        wrong_use = isinstance(error, ConfigurationError | MaskError)
        if launch.is_first_of_host or not wrong_use:  # what is wrong with a file is wrong in every process
            _tell(f"error: {error}" if launch.leads else f"{launch}: error: {error}", err=True)
        return WRONG_USE if wrong_use else FAILED
    except OSError as error:
        return _told_full(error, "What is finished is kept; make room, and the same command goes on.")
    except KeyboardInterrupt:
        if launch.leads:
            _tell("interrupted before the first run", err=True)
        return INTERRUPTED


def _told_full(error: OSError, way_out: str) -> int:
    """Tell of a full disk; any other error is raised."""
    from fish_tuning.files.atomic import DISK_FULL

    if error.errno not in DISK_FULL:
        raise error
    _tell(f"error: the disk is full ({error}). {way_out}", err=True)
    return FAILED


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _run(config_name: str, overrides: list[str], how: How, launch: Launch) -> int:
    from fish_tuning.experiments.config.extensions import load_extensions
    from fish_tuning.experiments.config.loading import load_experiments

    load_extensions(how.extensions)
    experiments = load_experiments(config_name, overrides)  # before torch is imported: a wrong key is told at once

    from fish_tuning.experiments.models.building import check_weights
    from fish_tuning.experiments.models.quantized import check_installed
    from fish_tuning.experiments.run.engines import check_engine
    from fish_tuning.experiments.run.plan import plan_experiment
    from fish_tuning.experiments.run.shards import parse_shard

    shard = parse_shard(how.shard)
    check_engine(how.engine, how.workers, launch)
    planned = []
    for config in experiments:  # all of them, before the first is run
        planned.append((config, plan_experiment(config)))
        if how.dry_run and launch.leads:
            _show_plan(_console(), *planned[-1])
        elif not how.dry_run:
            check_weights(config.model)
            check_installed(planned[-1][1].quantization)
    if how.dry_run:
        return OK
    if not launch.leads:
        return _follow(planned)
    return max([_run_one(config, plan, how, shard, launch) for config, plan in planned])


def _follow(planned: list[tuple[ExperimentConfig, Plan]]) -> int:
    """What every process of a launch but the first does: train along."""
    from fish_tuning.experiments.run.runner import run_experiment

    for config, plan in planned:
        try:
            run_experiment(config, plan)
        except KeyboardInterrupt:
            return INTERRUPTED
    return OK


def _run_one(config: ExperimentConfig, plan: Plan, how: How, shard: Shard, launch: Launch) -> int:
    from fish_tuning.experiments.run.engines import run_on_ray
    from fish_tuning.experiments.run.runner import run_experiment

    output_dir = _writable(Path(config.training.output_dir))
    part = f", part {shard.number} of {shard.of}" if shard.of > 1 else ""
    together = f", each on {launch.number} processes" if launch.number > 1 else ""
    _tell(
        f"{config.name}: {config.model.name} on {config.dataset.source}, {len(plan.arms)} arms x "
        f"{len(config.seeds)} seeds{part}{together}"
    )
    began = time.time()
    try:
        if how.engine == "ray":
            run_on_ray(config, plan, how.workers, shard, began, how.extensions)
        runs = run_experiment(config, plan, _show_run, shard, began)
    except KeyboardInterrupt:
        why = " (where one process ends, a launcher stops the others; its report says which)" if together else ""
        _tell(
            f"interrupted{why}; finished runs are kept in {output_dir}, the same command goes on from there", err=True
        )
        raise typer.Exit(INTERRUPTED) from None
    _show_results(_console(), config, plan, runs, output_dir)
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


def _console() -> Console:
    from fish_tuning.experiments.report.terminal import PlainConsole

    console = PlainConsole(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 100  # in a file or a pipe, whose width is unknown, nothing is cut
    return console


def _show_plan(console: Console, config: ExperimentConfig, plan: Plan) -> None:
    from fish_tuning.experiments.report.tables import fact_text, plain_table, plan_rows

    console.print(plain_table(*plan_rows(plan.arms), title=f"{config.name}: what each arm would train"))
    console.print()
    for key, value in plan.facts.items():
        console.print(f"{key.replace('_', ' ')}: {fact_text(value)}")
    console.print(f"seeds: {', '.join(map(str, config.seeds))}")
    for note in plan.notes:
        console.print(f"note: {note}")


def _show_run(run: RunRecord, already_there: bool) -> None:
    """One line for a finished run, written around the progress bar."""
    from tqdm import tqdm

    from fish_tuning.experiments.config.secrets import scrubbed
    from fish_tuning.experiments.config.texts import visible

    if run.status == "failed":
        text = f"failed: {run.error}"
    else:
        text = f"{run.metric} {'-' if run.value is None else format(run.value, '.4f')}"
        text += " (finished before)" if already_there else f" ({run.train_seconds or 0:.1f} s)"
    tqdm.write(visible(scrubbed(f"{run.arm}, seed {run.seed}: {text}")))


def _show_results(
    console: Console, config: ExperimentConfig, plan: Plan, runs: list[RunRecord], output_dir: Path
) -> None:
    from fish_tuning.experiments.compare.conclusions import conclusion
    from fish_tuning.experiments.compare.references import nothing_learned, unlearned_note, with_references
    from fish_tuning.experiments.compare.summaries import summarize
    from fish_tuning.experiments.report.results_files import FILES, report_notes, start_text
    from fish_tuning.experiments.report.tables import console_tables
    from fish_tuning.experiments.run.facts import report_facts

    summary = summarize(runs)
    console.print()
    start = start_text(config)
    title = config.name if len(start) > MOST_OF_TITLE else f"{config.name} ({start})"  # results.md has it in full
    for table in console_tables(with_references(summary, runs), console.width, title=title):
        console.print(table)
        console.print()
    rates = {run.arm: run.learning_rate for run in runs if run.learning_rate is not None}
    if nothing_learned(runs):
        console.print(f"note: {unlearned_note(plan.task.name, runs)}")
    for note in report_notes(config, report_facts(plan, rates), summary):
        console.print(f"note: {note}")
    written = [str(path) for path in [*(output_dir / name for name in FILES), *sorted(output_dir.glob("*.png"))]]
    console.print(f"written: {', '.join(written)}", soft_wrap=True)
    console.print()
    console.print(conclusion(runs))
