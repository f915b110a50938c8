"""`fish-tuning configs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fish_tuning.cli.application import app, errors_told, shipped_names, tell


@app.command()
def configs(
    name: Annotated[
        str | None,
        typer.Argument(help="A shipped experiment to print; all are listed without it.", autocompletion=shipped_names),
    ] = None,
    copy: Annotated[
        Path | None, typer.Option("--copy", metavar="FILE", help="Write it to this file, or into this folder, instead.")
    ] = None,
) -> None:
    """List the shipped experiments, or print or copy one of them.

    Exit code: 0, 1 when the disk is full, or 2 when there is no such experiment or FILE is there already.
    """
    from fish_tuning.errors import ConfigurationError

    with errors_told("Make room, or copy to another disk."):
        if name is not None:
            _show(name, copy)
        elif copy is not None:
            raise ConfigurationError(
                "--copy needs the name of a shipped experiment: fish-tuning configs NAME --copy FILE."
            )
        else:
            _list_all()


def _list_all() -> None:
    from fish_tuning.experiments.config.loading import describe, shipped_experiments

    shipped = shipped_experiments()
    width = max(map(len, shipped), default=0)
    for name, path in shipped.items():
        tell(f"{name:<{width}}  {describe(path)}")


def _show(name: str, copy: Path | None) -> None:
    from fish_tuning.experiments.config.loading import shipped_file
    from fish_tuning.experiments.config.new_files import write_new

    path = shipped_file(name)
    text = path.read_text(encoding="utf-8")
    if copy is None:
        tell(text.removesuffix("\n"))
        return
    copy = copy.expanduser()
    file = write_new(copy / path.name if copy.is_dir() else copy, text, "Name another with --copy.")
    tell(f"written: {file}")
