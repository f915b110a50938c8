"""What all commands share: the app, exit codes, and how things are told."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from fish_tuning.experiments.run.launch import Launch

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
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},  # of every command
)


def main() -> None:
    """The `fish-tuning` command. Exit code 1 where standard output cannot take what is told."""
    from fish_tuning.files.atomic import disk_full

    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where a failure can be told, not when the process ends
    except OSError as error:
        if disk_full(error) is None and not isinstance(error, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would fail again at the end
        if not isinstance(error, BrokenPipeError):  # whoever reads has gone, and needs no message
            tell(f"error: the disk is full ({error}): standard output could not be written.", err=True)
        sys.exit(FAILED)


def tell(text: str, *, err: bool = False) -> None:
    """Print what a terminal cannot take for a command, and without values that came from the environment."""
    from fish_tuning.experiments.config.secrets import scrubbed
    from fish_tuning.experiments.config.texts import visible

    typer.echo(visible(scrubbed(text)), err=err)


def _show_version(wanted: bool) -> None:
    if wanted:
        from fish_tuning import __version__

        tell(f"fish-tuning {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def shipped_names(incomplete: str) -> list[str]:
    """For the shell: the shipped experiments that begin like this."""
    from fish_tuning.experiments.config.loading import shipped_experiments

    return [name for name in shipped_experiments() if name.startswith(incomplete)]


def files_and_shipped_names(incomplete: str) -> list[str]:
    """For the shell: YAML files and folders that begin like this, then the shipped experiments."""
    from pathlib import Path

    typed = Path(incomplete).name if not incomplete.endswith("/") else ""
    before = incomplete.removesuffix(typed)
    try:
        found = sorted(path for path in Path(before or ".").expanduser().iterdir() if path.name.startswith(typed))
    except OSError:
        found = []
    shown = [path for path in found if typed.startswith(".") or not path.name.startswith(".")]
    folders = [f"{before}{path.name}/" for path in shown if path.is_dir()]
    files = [f"{before}{path.name}" for path in shown if path.suffix in (".yaml", ".yml") and path.is_file()]
    return [*files, *folders, *shipped_names(incomplete)]


ConfigArgument = Annotated[
    str,
    typer.Argument(
        metavar="FILE", help="An experiment file, or the name of a shipped one.", autocompletion=files_and_shipped_names
    ),
]
ExtensionOption = Annotated[
    list[str] | None,
    typer.Option(metavar="MODULE", help="A module or Python file of yours that registers what the file names."),
]


def quiet_libraries() -> None:
    """Before the libraries are imported: keep them from telling what no user of the command can act on."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # Where bitsandbytes is installed it warns of a faster kernel at every start, wanted or not.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


# What a disk, or a limit on files (`ulimit -f`), may answer with beside being full.
_OF_DISKS = {errno.EFBIG, errno.EIO, errno.ESTALE}


@contextmanager
def errors_told(
    full_disk: str,
    *,
    interrupted: str = "interrupted",
    wrong_use: tuple[type[Exception], ...] | None = None,
    launch: Launch | None = None,
) -> Iterator[None]:
    """What goes wrong in a command as one message and an exit code: the one place for all commands.

    Args:
        full_disk: the way out of a full disk.
        interrupted: what Ctrl-C is answered with.
        wrong_use: the errors of fish-tuning that are exit code 2, where others are failures, exit code 1; by default
            all are.
        launch: of several processes, which one this is: the first tells for all, the others what is theirs alone.
    """
    from fish_tuning.errors import FishTuningError
    from fish_tuning.files.atomic import disk_full

    leads = launch is None or launch.leads
    try:
        yield
    except FishTuningError as error:
        wrong = isinstance(error, wrong_use or FishTuningError)
        if launch is None or launch.is_first_of_host or not wrong:  # what is wrong with a file is so in every process
            tell(f"error: {error}" if leads else f"{launch}: error: {error}", err=True)
        raise typer.Exit(WRONG_USE if wrong else FAILED) from None
    except KeyboardInterrupt:
        if leads:
            tell(interrupted, err=True)
        raise typer.Exit(INTERRUPTED) from None
    except typer.Exit:
        raise
    except Exception as error:
        full = disk_full(error)  # a library may wrap what a full disk raises
        if full is None and isinstance(error, OSError) and error.filename is not None:
            tell(f"error: {str(error.filename)!r}: {error.strerror}", err=True)  # a file or folder that is not ours
            raise typer.Exit(WRONG_USE) from None
        if full is None and isinstance(error, OSError) and error.errno in _OF_DISKS:
            tell(f"error: a file could not be written or read ({error}). {full_disk}", err=True)
            raise typer.Exit(FAILED) from None
        if full is None:
            raise
        tell(f"error: the disk is full ({full}). {full_disk}", err=True)
        raise typer.Exit(FAILED) from None


@contextmanager
def renamings_untold(untold: type[Warning] = FutureWarning) -> Iterator[None]:
    """Without what no user of a command can act on, such as that libraries will rename things one day.

    Python's own options (`python -W`, PYTHONWARNINGS) have the last word.
    """
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore", untold)
        yield


def console(*, err: bool = False) -> Console:
    """The terminal; in a file or a pipe, whose width is unknown, nothing is cut."""
    from fish_tuning.experiments.report.terminal import PlainConsole

    made = PlainConsole(markup=False, highlight=False, emoji=False, stderr=err)
    if not made.is_terminal:
        made.width = 100
    return made
