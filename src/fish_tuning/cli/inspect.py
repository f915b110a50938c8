"""`fish-tuning inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from fish_tuning.cli.application import app, console, errors_told, tell


@app.command()
def inspect(
    masks: Annotated[
        list[str],
        typer.Argument(metavar="MASK_OR_ADAPTER", help="Mask files, sparse deltas or adapters, folders of adapters."),
    ],
    picture: Annotated[
        str | None, typer.Option("--picture", metavar="FILE.png", help="Draw layers by modules to this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The counts as one JSON document.")] = False,
) -> None:
    """Show where masks went, and how far several of them agree.

    The kept entries are counted by layer and module type.

    Exit code: 0, 1 when the disk is full, or 2 when a file is missing, is something else, or cannot be compared.
    """
    from fish_tuning.experiments.report.inspection import inspect_masks, masks_as_json

    with errors_told("Make room, or draw to another disk."):
        if as_json:
            tell(masks_as_json(masks, picture))
        else:
            inspect_masks(console(), masks, picture)
