#!/usr/bin/env python
"""The same as `fish-tuning run FILE [key=value ...]`, as a script:

python scripts/run_experiment.py --config configs/experiments/digits.yaml [key=value ...] [--dry-run]
"""

from __future__ import annotations

from typing import Annotated

import typer

from fish_tuning.cli import How, run_command


def main(
    config: Annotated[str, typer.Option("--config", help="An experiment file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the file.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what each arm would train, and train nothing.")
    ] = False,
) -> None:
    """Run an experiment: every arm with every seed, then tables, pictures and a sentence."""
    raise typer.Exit(run_command(config, overrides or [], How(dry_run)))


if __name__ == "__main__":
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command()(main)
    app()
