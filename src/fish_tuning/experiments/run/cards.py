"""What the model card of a run's adapter tells: how it was made, and this seed's own result."""

from __future__ import annotations

from pathlib import PurePath

from transformers import TrainingArguments

from fish_tuning.experiments.config.arm_names import ArmName
from fish_tuning.experiments.config.secrets import scrubbed
from fish_tuning.experiments.records.run_record import ArmPlan
from fish_tuning.experiments.run.context import Context
from fish_tuning.masks.selections import SELECTIONS
from fish_tuning.sharing.card import CardFacts


def run_facts(context: Context, arm: ArmPlan, seed: int, args: TrainingArguments, value: float) -> CardFacts:
    """The facts for the card. One run cannot know what all seeds give together: the report does, and the card says so.

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
    result = (
        f"{plan.metric} {value:.4f} on the {len(plan.task.validation):,} examples of the split "
        f"`{plan.task.validation_split}`: this seed's alone, one of {seeds}. What all seeds give together, with its "
        "interval and beside the other arms, is in the experiment's report: `results.md` and `results.json` of its "
        "output folder, which are no part of this one."
        if seeds > 1
        else f"{plan.metric} {value:.4f} on the {len(plan.task.validation):,} examples of the split "
        f"`{plan.task.validation_split}`: one seed, which says nothing of how far others would differ."
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


def _rows(context: Context, arm: ArmPlan, seed: int, args: TrainingArguments) -> dict[str, str]:
    config, data = context.config, context.config.dataset
    rows = {
        "data set's configuration": ", ".join(data.load_args[1:]),
        "data files": ", ".join(PurePath(file).name for file in data.data_files.values()),
        "data set's revision": data.revision or "",
        "data fingerprint": str(context.shared["data"]),
        "base weights' fingerprint": str(context.shared["weights"]),
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
    rows["training"] = f"{length}, learning_rate {args.learning_rate:g}, batches of {args.train_batch_size}" + (
        f" in each of {args.world_size} processes" if args.world_size > 1 else ""
    )
    return rows
