"""What the model card of a run's adapter tells: how it was made, this seed's own result, and that of all seeds."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from transformers import TrainingArguments

from fish_tuning.experiments.compare.summaries import FEWEST_FOR_INTERVAL, mean_interval
from fish_tuning.experiments.config.arm_names import ArmName
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.secrets import scrubbed
from fish_tuning.experiments.records.record_files import adapter_folder
from fish_tuning.experiments.records.run_record import ArmPlan, RunRecord
from fish_tuning.experiments.run.context import Context
from fish_tuning.experiments.run.fsdp import sharded_by
from fish_tuning.files.atomic import write_atomically
from fish_tuning.masks.selections import SELECTIONS
from fish_tuning.sharing.card import CARD, CardFacts, with_paragraph

_ELSEWHERE = (
    "How it compares with the other arms is in the experiment's report: `results.md` and `results.json` of its output "
    "folder, which are no part of this one."
)


def run_facts(context: Context, arm: ArmPlan, seed: int, args: TrainingArguments, value: float) -> CardFacts:
    """The facts for the card. One run cannot know what all seeds give together: `tell_all_seeds` adds it.

    Args:
        context: what all runs share.
        arm: what was trained.
        seed: of this run.
        args: what it was trained with.
        value: of the plan's metric, on the validation split.
    """
    config, plan = context.config, context.plan
    data = config.dataset
    seeds = len(config.seeds)
    measured = (
        f"{plan.metric} {value:.4f} on the {len(plan.task.validation):,} examples of the split "
        f"`{plan.task.validation_split}`: "
    )
    result = (
        f"{measured}this seed's alone, one of {seeds}.\n\nWhat all seeds give together is known when the last of them "
        f"is done. {_ELSEWHERE}"
        if seeds > 1
        else f"{measured}one seed, which says nothing of how far others would differ."
    )
    return CardFacts(
        title=scrubbed(f"{arm.arm} on {plan.task.name}"),
        base_model=scrubbed(config.model.name),
        revision=None if config.model.revision is None else scrubbed(config.model.revision),
        dataset=scrubbed(data.load_args[0]) if data.load_args else None,
        rows={name: scrubbed(text) for name, text in _rows(context, arm, seed, args).items() if text},
        metric=plan.metric,
        value=value,
        result=scrubbed(result),
    )


def tell_all_seeds(config: ExperimentConfig, records: Sequence[RunRecord], folder: Path) -> None:
    """Put into the cards of arms whose seeds are all done what these give together.

    No record tells of a card, so records and adapters belong together as before. A card that a user wrote or changed
    stays as it is, and so does one that says so already.
    """
    for arm in dict.fromkeys(record.arm for record in records):
        runs = [record for record in records if record.arm == arm]
        if len(config.seeds) < 2 or {run.seed for run in runs} != set(config.seeds):
            continue
        paragraph = all_seeds_text(runs)
        for run in runs:
            card = adapter_folder(folder, arm, run.seed) / CARD
            # Another process may be putting the run's folder in its place anew: its own report follows.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                before = card.read_bytes()
                if paragraph and run.status == "ok" and (after := with_paragraph(before, paragraph)) != before:
                    write_atomically(card, after)


def all_seeds_text(runs: Sequence[RunRecord]) -> str:
    """What an arm's seeds give together, for the card of one of them; empty where fewer than two finished."""
    values = {run.seed: run.value for run in runs if run.status == "ok" and run.value is not None}
    found = mean_interval(list(values.values()))
    if found.mean is None or found.n < 2:
        return ""
    failed = len(runs) - found.n
    which = f"The {found.n} seeds that finished" if failed else f"All {found.n} seeds"
    interval = (
        f", 95 % interval [{found.low:.4f}, {found.high:.4f}] (Student's t over seeds, which covers what a seed "
        "changes: head, data order, masks; not the choice of examples or of the data set)"
        if found.low is not None
        else "; no interval is given, all are equal, which tells nothing of their spread"
        if found.n >= FEWEST_FOR_INTERVAL
        else "; no interval is given for fewer than three, it would say nothing"
    )
    left_out = f" {failed} failed." if failed else ""
    return (
        f"{which} ({', '.join(map(str, sorted(values)))}), together: mean {runs[0].metric} {found.mean:.4f}{interval}."
        f"{left_out} This adapter is one of them, not their mean. {_ELSEWHERE}"
    )


def as_used(context: Context) -> Any:
    """The tokenizer or image processor as it is saved beside an adapter: it knows the length that texts were cut to.

    `model_max_length` is transformers' own name for it, so pipelines and `predict` cut as training did. A language
    model's prompts are not cut, so its tokenizer stays as it is.
    """
    processing_class = context.plan.processing_class
    if not context.plan.task.brings_head or not hasattr(processing_class, "model_max_length"):
        return processing_class
    used = copy.copy(processing_class)
    used.model_max_length = context.config.training.max_seq_length
    return used


def _rows(context: Context, arm: ArmPlan, seed: int, args: TrainingArguments) -> dict[str, str]:
    config, data = context.config, context.config.dataset
    rows = {
        "data set's configuration": ", ".join(data.load_args[1:]),
        "data files": ", ".join(PurePath(file).name for file in data.data_files.values()),
        "data set's revision": data.revision or "",
        "data fingerprint": context.fingerprints["data_fingerprint"],
        "base weights' fingerprint": context.fingerprints["weights_fingerprint"],
        "texts are cut to": _length(context),
        "experiment": f"{config.name}, arm {arm.arm}, seed {seed}",
        "method of the run": f"{arm.method}, {arm.size}",
    }
    selection = ArmName.parse(arm.arm).selection
    if selection is not None:
        choice = context.choice(arm)
        scored = SELECTIONS.find(selection.name).needs_scores
        rows["score"] = f"{choice.score}, on {choice.num_samples} training examples" if scored else "none"
        rows["selection"] = f"{arm.selection}, by {choice.granularity}"
        rows["budget"] = f"{arm.kept:,} of the {arm.pool:,} entries of the pool ({arm.kept / arm.pool:.2%})"
        rows["start"] = config.start(config.method_of(arm.arm), scores=scored)
    rows["trained as a whole"] = f"{arm.dense:,} entries of the head" if arm.dense else ""
    length = f"max_steps {args.max_steps}" if args.max_steps > 0 else f"num_train_epochs {args.num_train_epochs:g}"
    rows["training"] = f"{length}, learning_rate {args.learning_rate:g}, {batches_text(args)}{sharded_by(args)}"
    return rows


def batches_text(args: TrainingArguments) -> str:
    """How many examples a step of the optimizer sees, and of what they are made up."""
    size, accumulated, processes = args.train_batch_size, args.gradient_accumulation_steps, args.world_size
    parts = [
        f"batches of {size}",
        f"gradient_accumulation_steps {accumulated}" if accumulated > 1 else "",
        f"{processes} processes" if processes > 1 else "",
    ]
    text = " x ".join(part for part in parts if part)
    return text if text == parts[0] else f"{text} = {size * accumulated * processes} examples a step"


def _length(context: Context) -> str:
    reads_texts = context.plan.task.encodes and context.plan.task.processor == "tokenizer"
    return f"{context.config.training.max_seq_length} tokens (`max_seq_length`)" if reads_texts else ""
