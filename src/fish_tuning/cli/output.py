"""What `run` and `plan` tell, and where: for people, for a program (`--json`), or only errors (`--quiet`)."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fish_tuning.cli.application import console, tell

if TYPE_CHECKING:
    from rich.console import Console

    from fish_tuning.experiments.config.experiment import ExperimentConfig
    from fish_tuning.experiments.records.run_record import RunRecord
    from fish_tuning.experiments.run.plan import Plan

MOST_OF_TITLE = 80  # characters


class Output:
    """Tells of the experiments of one command.

    Args:
        quiet: only runs that failed, on standard error.
        as_json: notes on standard error, and a list of what was found at the end, one entry an experiment.
        out: writes that list.
    """

    def __init__(self, quiet: bool = False, as_json: bool = False, out: Any = None) -> None:
        self.quiet, self.as_json, self.out = quiet, as_json, out
        self.found: list[dict[str, Any]] = []

    def tell(self, text: str) -> None:
        if not self.quiet:
            tell(text, err=self.as_json)

    def plan(self, config: ExperimentConfig, plan: Plan) -> None:
        """What each arm would train."""
        if self.as_json:
            self.found.append(_plan_data(config, plan))
        elif not self.quiet:
            _show_plan(console(), config, plan)

    def run(self, run: RunRecord, already_there: bool) -> None:
        """One line for a finished run, written around the progress bar."""
        from tqdm import tqdm

        from fish_tuning.experiments.report.terminal import plain

        failed = run.status == "failed"
        if failed:
            text = f"failed: {run.error}"
        else:
            text = f"{run.metric} {'-' if run.value is None else format(run.value, '.4f')}"
            text += " (finished before)" if already_there else f" ({run.train_seconds or 0:.1f} s)"
        if failed or not self.quiet:
            aside = self.quiet or self.as_json
            tqdm.write(plain(f"{run.arm}, seed {run.seed}: {text}"), file=sys.stderr if aside else sys.stdout)

    def results(
        self,
        config: ExperimentConfig,
        plan: Plan,
        runs: list[RunRecord],
        output_dir: Path,
        fingerprints: Mapping[str, str],
    ) -> None:
        """The tables, notes, files and differences of a finished experiment; `fingerprints` are of data and weights."""
        if self.as_json:
            self.found.append(_results_data(config, plan, runs, output_dir, fingerprints))
        if not self.quiet:
            _show_results(console(err=self.as_json), config, plan, runs, output_dir, notes_alone=self.as_json)

    def finish(self) -> None:
        """Write the document."""
        if self.as_json:
            write_document(self.found, self.out)


def write_document(content: Any, out: Any) -> None:
    """One JSON document to what `stdout_kept` gives, its texts without values that came from the environment."""
    import json

    from fish_tuning.experiments.config.secrets import redacted

    out.write(f"{json.dumps(redacted(content), indent=2, allow_nan=False)}\n")
    out.flush()


@contextlib.contextmanager
def stdout_kept(wanted: bool) -> Iterator[Any]:
    """Standard output for a document alone: what else is written there, by C code too, goes to standard error."""
    if not wanted:
        yield sys.stdout
        return
    out = sys.stdout
    try:
        number, kept = out.fileno(), os.dup(out.fileno())
    except (io.UnsupportedOperation, OSError):  # a stream of Python's alone
        with contextlib.redirect_stdout(sys.stderr):
            yield out
        return
    out.flush()
    try:
        os.dup2(sys.stderr.fileno(), number)
        with contextlib.redirect_stdout(sys.stderr), open(kept, "w", encoding="utf-8", closefd=False) as own:
            yield own
    finally:
        out.flush()
        os.dup2(kept, number)
        os.close(kept)


@contextlib.contextmanager
def library_log(verbose: bool, told: bool) -> Iterator[None]:
    """The library's log on standard error: all of it if `verbose`, else warnings, and errors alone unless `told`."""
    logger, handler = logging.getLogger("fish_tuning"), _AroundTheBar()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    before = logger.level, logger.propagate
    if not told:
        logger.setLevel(logging.ERROR)
    elif verbose:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False  # or Python's last resort tells warnings twice
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


class _AroundTheBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        from fish_tuning.experiments.report.terminal import plain

        tqdm.write(plain(self.format(record)), file=sys.stderr)


def _plan_data(config: ExperimentConfig, plan: Plan) -> dict[str, Any]:
    from dataclasses import asdict

    from fish_tuning.experiments.config.secrets import redacted
    from fish_tuning.experiments.report.results_files import finite

    data = {
        "experiment": config.name,
        "config": config.model_dump(mode="json"),
        "facts": dict(plan.facts),
        "arms": [asdict(arm) for arm in plan.arms],
        "notes": list(plan.notes),
    }
    found: dict[str, Any] = finite(redacted(data))
    return found


def _results_data(
    config: ExperimentConfig,
    plan: Plan,
    runs: list[RunRecord],
    output_dir: Path,
    fingerprints: Mapping[str, str],
) -> dict[str, Any]:
    from fish_tuning.experiments.report.results_files import results_data
    from fish_tuning.experiments.run.facts import report_facts

    facts = report_facts(plan, _chosen_rates(config, runs), **fingerprints, **_ties(output_dir))
    return {**results_data(config, facts, runs), "files": [str(path) for path in _written(output_dir)]}


def _chosen_rates(config: ExperimentConfig, runs: list[RunRecord]) -> dict[str, float]:
    """Of arms that had several to choose from."""
    return {
        run.arm: run.learning_rate
        for run in runs
        if run.learning_rate is not None and len(config.learning_rates_of(config.method_of(run.arm))) > 1
    }


def _ties(output_dir: Path) -> dict[str, Any]:
    """Learning rates that were equally good, as the results that were just written tell of them; else nothing."""
    import json

    key = "learning_rate_ties"
    try:
        facts = json.loads((output_dir / "results.json").read_bytes())["facts"]
    except (OSError, ValueError, KeyError):  # somebody has taken them away meanwhile
        return {}
    return {key: facts[key]} if key in facts else {}


def _written(output_dir: Path) -> list[Path]:
    from fish_tuning.experiments.report.results_files import FILES

    return [*(output_dir / name for name in FILES), *sorted(output_dir.glob("*.png"))]


def _show_plan(console: Console, config: ExperimentConfig, plan: Plan) -> None:
    from fish_tuning.experiments.report.tables import fact_text, plain_table, plan_rows

    console.print(plain_table(*plan_rows(plan.arms), title=f"{config.name}: what each arm would train"))
    console.print()
    for key, value in plan.facts.items():
        console.print(f"{key.replace('_', ' ')}: {fact_text(value)}")
    console.print(f"seeds: {', '.join(map(str, config.seeds))}")
    for note in plan.notes:
        console.print(f"note: {note}")


def _show_results(
    console: Console,
    config: ExperimentConfig,
    plan: Plan,
    runs: list[RunRecord],
    output_dir: Path,
    *,
    notes_alone: bool = False,
) -> None:
    from fish_tuning.experiments.compare.conclusions import conclusion, differences
    from fish_tuning.experiments.compare.references import learning_notes, with_references
    from fish_tuning.experiments.compare.summaries import summarize
    from fish_tuning.experiments.report.results_files import report_notes, start_text
    from fish_tuning.experiments.report.tables import console_tables, difference_table
    from fish_tuning.experiments.run.facts import report_facts

    summary = summarize(runs)
    if not notes_alone:
        console.print()
        start = start_text(config)
        title = config.name if len(start) > MOST_OF_TITLE else f"{config.name} ({start})"  # results.md has it in full
        for table in console_tables(with_references(summary, runs), console.width, title=title):
            console.print(table)
            console.print()
    facts = report_facts(plan, _chosen_rates(config, runs), **_ties(output_dir))
    for note in [*learning_notes(str(facts.get("task") or "the task"), runs), *report_notes(config, facts, summary)]:
        console.print(f"note: {note}")
    console.print(f"written: {', '.join(map(str, _written(output_dir)))}", soft_wrap=True)
    if notes_alone:
        return
    console.print()
    if compared := differences(runs):
        console.print(difference_table(compared, console.width))
        console.print()
    console.print(conclusion(runs))
