"""The files of an experiment: results.json, results.csv, results.md and the pictures."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fish_tuning.experiments.compare.comparisons import Comparison, choice_pairs, compare
from fish_tuning.experiments.compare.conclusions import conclusion, differences
from fish_tuning.experiments.compare.references import learning_notes, with_references
from fish_tuning.experiments.compare.summaries import FEWEST_FOR_INTERVAL, ArmSummary, summarize
from fish_tuning.experiments.config.arm_names import HEAD_ALONE, ArmName
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.secrets import redacted, scrubbed
from fish_tuning.experiments.records.run_record import RunRecord, scrubbed_record
from fish_tuning.experiments.report.tables import (
    DIFFERENCE_TEXTS,
    difference_rows,
    fact_text,
    harmless,
    markdown_table,
    table_rows,
)
from fish_tuning.files.atomic import write_atomically

FILES = ("results.json", "results.csv", "results.md")  # beside the pictures
_NOT_IN_CSV = ("kept", "metrics", "loss_curve", "experiment")  # tables of their own; they are in results.json


def write_report(
    config: ExperimentConfig, plan_facts: Mapping[str, Any], runs: Sequence[RunRecord], output_dir: Path
) -> list[Path]:
    """Write what is known so far; each file is replaced as a whole, so a reader never sees half of one.

    Pictures are drawn once all runs are there (drawing takes longer than writing). Returns the paths written.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    # What came from the environment goes out of the texts here: in a whole file it would go out of keys and numbers.
    plan_facts, runs = redacted(dict(plan_facts)), [scrubbed_record(run) for run in runs]
    pictures: dict[Path, str] = {}
    if len(runs) >= _planned(config, plan_facts):
        from fish_tuning.experiments.report.pictures.folder import draw_pictures

        pictures = draw_pictures(plan_facts.get("arms") or config.arms, runs, output_dir)
    texts = {
        "results.json": json.dumps(results_data(config, plan_facts, runs), indent=2) + "\n",
        "results.csv": _csv(scrubbed(config.name), runs),
        "results.md": _markdown(config, plan_facts, runs, pictures),
    }
    for name, text in texts.items():
        write_atomically(output_dir / name, text.encode())
    return [*(output_dir / name for name in texts), *pictures]


def report_notes(config: ExperimentConfig, facts: Mapping[str, Any], summary: Sequence[ArmSummary]) -> list[str]:
    """What a reader must know beside the numbers: the plan's notes (`facts["notes"]`), failures, the intervals."""
    notes = list(facts.get("notes", []))
    if any(0 < arm.n_ok < FEWEST_FOR_INTERVAL for arm in summary):
        notes.append(
            f"No interval is given where fewer than {FEWEST_FOR_INTERVAL} seeds finished: it would say nothing."
        )
    if any(arm.low is not None for arm in summary):
        notes.append(
            "Intervals are Student's t over seeds: they cover what a seed changes (head, data order, masks), not the "
            "choice of examples or of the data set."
        )
    notes += _rate_notes(config, facts.get("learning_rates") or {})
    if ties := facts.get("learning_rate_ties"):
        told = "; ".join(f"{arm} {', '.join(f'{rate:g}' for rate in rates)}" for arm, rates in ties.items())
        notes.append(f"Learning rates that were equally good, so that the loss, then the smaller rate decided: {told}.")
    if config.training.early_stopping_patience:
        notes.append(
            "Early stopping: each run went back to its best epoch on the validation set, the one that is reported."
        )
    planned = _planned(config, facts)
    finished = sum(arm.n_ok + arm.n_failed for arm in summary)
    if finished < planned:
        notes.append(f"{finished} of {planned} runs are in; the rest has not run yet.")
    if any(arm.peak_memory_of == "process" and arm.peak_memory_bytes for arm in summary):
        notes.append("Peak memory is that of the whole process, with Python, its libraries and the data in it.")
    notes += [f"{arm.arm}, {error}" for arm in summary for error in arm.errors]
    return notes


def _rate_notes(config: ExperimentConfig, chosen: Mapping[str, float]) -> list[str]:
    """How learning rates were chosen, and for which arms the best one may lie beyond those that were tried."""
    of_name = {section.name: config.learning_rates_of(section) for section in config.peft}
    of_name |= {HEAD_ALONE: config.training.learning_rates} if HEAD_ALONE in config.arms else {}
    lists = [rates for rates in dict.fromkeys(map(tuple, of_name.values())) if len(rates) > 1]
    if not lists:
        return []
    tried = "; or ".join(", ".join(f"{rate:g}" for rate in rates) for rates in lists)
    measure = " by the loss" if config.training.choose_by == "loss" else ""
    number = config.training.trial_seeds
    seeds = "the first seed" if number == 1 else f"the first {number} seeds"
    found = ", ".join(f"{arm} {rate:g}" for arm, rate in chosen.items())
    notes = [
        f"The learning rate of each arm was chosen{measure} on a fifth of the training set, with {seeds}, among "
        f"{tried}: {found or 'none yet'}."
    ]
    at_the_end = [
        f"{arm} ({rate:g})"
        for arm, rate in chosen.items()
        if (rates := of_name.get(ArmName.parse(arm).method)) and rate in (min(rates), max(rates))
    ]
    if at_the_end:
        notes.append(f"The best rate is the smallest or largest tried, and may lie beyond: {', '.join(at_the_end)}.")
    return notes


def results_data(config: ExperimentConfig, facts: Mapping[str, Any], runs: Sequence[RunRecord]) -> dict[str, Any]:
    """What results.json holds; see docs/configuration.md."""
    runs = [scrubbed_record(run) for run in runs]
    data = {
        "experiment": scrubbed(config.name),
        "config": redacted(config.model_dump(mode="json")),
        "facts": redacted(dict(facts)),
        "runs": [run.to_dict() for run in runs],
        "summary": [asdict(arm) for arm in summarize(runs)],
        "comparisons": [asdict(each) for each in compared(runs)],
    }
    return dict(finite(data))


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(name: str, runs: Sequence[RunRecord]) -> str:
    columns = [field.name for field in fields(RunRecord) if field.name not in _NOT_IN_CSV]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["experiment", *columns])
    for run in runs:
        writer.writerow([harmless(cell) for cell in (name, *(getattr(run, column) for column in columns))])
    return text.getvalue()


def _markdown(
    config: ExperimentConfig, facts: Mapping[str, Any], runs: Sequence[RunRecord], pictures: Mapping[Path, str]
) -> str:
    summary = summarize(runs)
    headers, rows = table_rows(with_references(summary, runs))
    parts = [
        f"# {scrubbed(config.name)}",
        _list(f"{key}: {fact_text(redacted(value))}" for key, value in _settings(config, facts).items()),
        markdown_table(headers, rows),
    ]
    if found := differences(runs):
        parts += ["## Differences", markdown_table(*difference_rows(found), left=DIFFERENCE_TEXTS)]
    parts.append(conclusion(runs))
    learned = learning_notes(str(facts.get("task") or "the task"), runs)
    if notes := [*learned, *report_notes(config, facts, summary)]:
        parts += ["## Notes", _list(map(scrubbed, notes))]
    parts += [f"![{caption}]({path.name})" for path, caption in pictures.items()]
    return "\n\n".join(parts) + "\n"


def _planned(config: ExperimentConfig, facts: Mapping[str, Any]) -> int:
    return len(facts.get("arms") or config.arms) * len(config.seeds)


def budget_text(config: ExperimentConfig) -> str:
    """How many entries the masked arms keep, as the protocol sets it."""
    fish = config.fish_tuning
    if config.protocol == "fixed_layers":
        return f"{', '.join(f'{ratio:g}' for ratio in fish.keep_ratio)} of the pool"
    if config.protocol == "fixed_budget":
        layers = ", ".join(map(str, fish.top_layers))
        return f"as many parameters as the dense arms of the top {layers} layers, out of the top {fish.pool_layers}"
    if config.protocol == "fixed_count":
        return f"{', '.join(f'{number:,}' for number in fish.kept_parameters)} entries of each pool"
    return f"{fish.prune_to_ratio_of_baseline:g} x the trainable parameters of the dense arm"


def compared(runs: Sequence[RunRecord]) -> list[Comparison]:
    """Each arm with its dense arm, then what scores choose with other choices; each of the two corrected by itself."""
    finished = [run for run in runs if run.status == "ok"]
    return [*compare(finished), *compare(finished, choice_pairs(run.arm for run in finished))]


def start_text(config: ExperimentConfig) -> str:
    """The start of each method's adapter, and of the scores where it has masked arms; like methods together."""
    masked = {ArmName.parse(arm).method for arm in config.arms if ArmName.parse(arm).suffix}
    texts: dict[str, list[str]] = {}
    for section in config.peft:
        texts.setdefault(config.start(section, scores=section.name in masked), []).append(section.name)
    if len(texts) == 1:
        return next(iter(texts))
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in texts.items())


def _settings(config: ExperimentConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What was run, the main choices first; facts of the plan follow under their own names."""
    training = config.training.args_override
    settings: dict[str, Any] = {
        "model": f"{config.model.name} ({config.model.dtype})",
        "data set": config.dataset.source,
        "adapters": facts.get("adapters"),
        "budget": budget_text(config),
        "start": start_text(config),
        "seeds": [str(seed) for seed in config.seeds],
    }
    chosen = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "weight_decay")
    settings |= {key: str(training[key]) for key in chosen if key in training}
    told = (*settings, "notes", "arms", "learning_rates", "learning_rate_ties")
    return settings | {key.replace("_", " "): value for key, value in facts.items() if key not in told}


def _list(lines: Any) -> str:
    return "\n".join("- " + str(line).replace("\n", "\n  ") for line in lines)
