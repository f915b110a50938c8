"""A task's Trainer as the runner uses it, and what it measures."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fish_tuning.errors import FishTuningError
from fish_tuning.experiments.models.base_weights import own_head
from fish_tuning.experiments.records.run_record import ArmPlan
from fish_tuning.experiments.run.context import Context
from fish_tuning.training.head_rate import set_head_learning_rate


class Diverged(FishTuningError):
    """Training left numbers that are not finite: a verdict about the learning rate, as no other error is."""


def make_trainer(
    context: Context, arm: ArmPlan, model: Any, args: TrainingArguments, callbacks: list[TrainerCallback]
) -> Trainer:
    """The task's Trainer, which prints nothing."""
    trainer = context.plan.task.make_trainer(
        model=model,
        args=args,
        train_dataset=context.data.train,
        eval_dataset=context.data.validation,
        processing_class=context.plan.processing_class,
        callbacks=callbacks,
    )
    _measure_all_rows(trainer)
    trainer.remove_callback(PrinterCallback)  # it prints every log to standard output
    if context.head_learning_rate is not None:
        set_head_learning_rate(trainer, context.head_learning_rate, own_head(arm.method, arm.settings))
    return trainer


def _measure_all_rows(trainer: Trainer) -> None:
    """`dataloader_drop_last` is of training: transformers would leave rows of the validation set out as well."""
    batches, args = trainer.get_eval_dataloader, trainer.args

    def get_eval_dataloader(eval_dataset: Any = None) -> Any:
        drops, args.dataloader_drop_last = args.dataloader_drop_last, False
        try:
            return batches(eval_dataset)
        finally:
            args.dataloader_drop_last = drops

    if args.dataloader_drop_last:
        trainer.get_eval_dataloader = get_eval_dataloader  # type: ignore[method-assign]


def evaluate(context: Context, trainer: Trainer) -> dict[str, float]:
    """Loss and metrics on the validation set, and on further ones under their names.

    Raises Diverged where a weight, the loss or the experiment's metric is not finite.
    """
    _check_weights(trainer)
    names = ("loss", *context.plan.task.metrics, "perplexity")
    metrics = trainer.evaluate(metric_key_prefix="eval")
    found = {name: float(metrics[f"eval_{name}"]) for name in names if f"eval_{name}" in metrics}
    for kind, split in context.data.more_validation.items():
        prefix = f"eval_{kind}"
        more = trainer.evaluate(split, metric_key_prefix=prefix)
        found |= {f"{name}_{kind}": float(more[f"{prefix}_{name}"]) for name in names if f"{prefix}_{name}" in more}
    for name in ("loss", context.plan.metric):
        if not math.isfinite(found[name]):
            raise Diverged(
                f"After {trainer.state.global_step} steps the evaluation's {name} is {found[name]}: training "
                "diverged or every prediction is the same. Try a lower learning rate."
            )
    return found


def whole_state(trainer: Trainer) -> dict[str, Any] | None:
    """The trained model's state, put together where FSDP or DeepSpeed leaves each process a part of it; else None.

    Every process must call this; process 0 gets it.
    """
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return None
    state: dict[str, Any] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return state


def _check_weights(trainer: Trainer) -> None:
    model: Any = trainer.model
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise Diverged(
                f"After {trainer.state.global_step} steps {name} holds numbers that are not finite: training diverged. "
                "Try a lower learning rate."
            )
