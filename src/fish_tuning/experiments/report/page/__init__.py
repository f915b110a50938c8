"""One page that tells what an experiment, or several joined, have shown: report.html, .md, .tex and .csv."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.report.page.html import html_page
from fish_tuning.experiments.report.page.load import read_experiments
from fish_tuning.experiments.report.page.results import join_results
from fish_tuning.experiments.report.page.texts import csv_text, latex_text, markdown_text
from fish_tuning.files.atomic import DISK_FULL, write_atomically

__all__ = ["write_page"]


def write_page(folders: Sequence[Path], output: Path | None = None) -> tuple[list[Path], list[str]]:
    """Join the experiments in and below `folders` and write the report; returns the paths and the notes for the user.

    Args:
        folders: experiment folders (`runs/*.json`, `results.json`), or folders above them.
        output: where the report goes; the first of `folders` by default.

    Raises:
        ConfigurationError: a folder is missing or has no readable run, or `output` cannot be written.
        OSError: the disk is full; what was there before is kept.
    """
    experiments, notes = read_experiments(folders)
    results = join_results(experiments)
    notes = [*notes, *results.notes]
    target = output or folders[0]
    texts = {
        "report.html": html_page(results, experiments, notes),
        "report.md": markdown_text(results, notes),
        "report.tex": latex_text(results),
        "report.csv": csv_text(results),
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        return [write_atomically(target / name, text.encode()) for name, text in texts.items()], notes
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise ConfigurationError(f"report: cannot write to {target}: {error.strerror}") from error
