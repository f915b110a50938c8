"""`fish-tuning init`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fish_tuning.cli.application import ExtensionOption, app, errors_told, quiet_libraries, renamings_untold, tell

STDOUT = "-"


@app.command()
def init(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model's name on the hub, its folder, or builtin:digits-vit.")
    ],
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA [KEY=VALUE]...",
            help="A data set's name on the hub and maybe a configuration, a folder, or a csv, tsv, json, jsonl or "
            "parquet file; then what is known better than found, e.g. dataset.text_column=title.",
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="What to write; - for standard output, DATA.yaml by default."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE where it is there already.")] = False,
    extension: ExtensionOption = None,
) -> None:
    """Write an experiment file for a model and data at hand.

    Beside every key stands what was found in them, and what else is allowed.

    Exit code: 0, 1 when the disk is full, or 2 when nothing that runs can be made of the two, or FILE is there already.
    """
    quiet_libraries()
    with errors_told("Make room, or write elsewhere with --output."), renamings_untold():
        _init(model, data, output, force, tuple(extension or ()))


def _init(model: str, data: list[str], output: str | None, force: bool, extensions: tuple[str, ...]) -> None:
    from fish_tuning.experiments.config.extensions import load_extensions
    from fish_tuning.experiments.config.neighbours import DATA_FILES, refuse_missing
    from fish_tuning.experiments.config.new_files import refuse_old, write_new
    from fish_tuning.experiments.config.schema import SCHEMA_FILE

    way_out = "Name another with --output, or replace it with --force."
    if output not in (None, STDOUT) and not force:
        refuse_old(Path(str(output)).expanduser(), way_out)  # before the data is read
    overrides = [word for word in data if _is_override(word)]
    source = [word for word in data if word not in overrides]
    if len(source) == 1 and source[0].lower().endswith(DATA_FILES):
        refuse_missing(source)  # before the libraries are imported, which takes seconds
    load_extensions(extensions)

    from fish_tuning.experiments.run.draft import draft_experiment

    folder = Path() if output in (None, STDOUT) else Path(str(output)).expanduser().parent
    modeline = [f"yaml-language-server: $schema={SCHEMA_FILE}"] if (folder / SCHEMA_FILE).is_file() else []
    draft = draft_experiment(model, source, overrides, modeline)
    if output == STDOUT:
        tell(draft.text.removesuffix("\n"))
        return
    file = write_new(Path(output or f"{draft.name}.yaml").expanduser(), draft.text, way_out, force=force)
    for note in draft.notes:
        tell(f"note: {note}")
    tell(f"written: {file}")
    tell(f"check it with: fish-tuning run {file} --dry-run")


def _is_override(word: str) -> bool:
    """Whether a word is KEY=VALUE: no file or folder that is there, nor a path with such a sign in it."""
    key, sign, _ = word.partition("=")
    return bool(sign) and "/" not in key and not os.path.exists(os.path.expanduser(word))
