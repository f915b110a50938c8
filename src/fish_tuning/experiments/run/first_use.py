"""What a process pays once: kernels and library code that are loaded when they are first used."""

from __future__ import annotations

from itertools import islice

from fish_tuning.experiments.records.run_record import ArmPlan
from fish_tuning.experiments.run.calibration import train_steps
from fish_tuning.experiments.run.context import Context
from fish_tuning.scores.fisher import calculate_fisher_information


def use_once(context: Context, arm: ArmPlan, seed: int) -> None:
    """One training step and one scored batch of a model that is thrown away, so that no arm's seconds hold the cost."""
    args = context.arguments(arm, seed)
    model = context.starts(arm.arm, seed, args.device)
    train_steps(context, arm, seed, model, args.learning_rate, 1)
    batches = list(islice(context.calibration_loader(seed, args.per_device_train_batch_size), 1))
    calculate_fisher_information(model, batches, device=args.device, progress=False)
