"""`fish-tuning report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fish_tuning.cli.application import app, errors_told, tell


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR", help="Output folders of experiments, or folders above them.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FOLDER", help="Where to write; the first DIR by default.")
    ] = None,
) -> None:
    """Join the runs of experiments into one page, report.html.

    Its numbers lie beside it as .md, .tex and .csv.

    Exit code: 0, 1 when the disk is full, or 2 when a folder is missing or has no run that can be read.
    """
    from fish_tuning.experiments.report.page import write_page

    with errors_told("Make room, or write elsewhere with --output."):
        written, notes = write_page(folders, output)
    for note in notes:
        tell(f"note: {note}")
    tell(f"written: {', '.join(map(str, written))}")
