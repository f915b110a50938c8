"""What a process pays once: kernels and library code that are loaded when they are first used."""

from __future__ import annotations

import warnings
from itertools import islice

from fish_tuning.errors import FishTuningWarning
from fish_tuning.experiments.records.run_record import ArmPlan
from fish_tuning.experiments.run.calibration_examples import calibration_loader
from fish_tuning.experiments.run.context import Context
from fish_tuning.experiments.run.loggers import NO_REPORTS
from fish_tuning.experiments.run.trainers import make_trainer
from fish_tuning.scores.fisher import calculate_fisher_information

ONE_STEP = {"max_steps": 1, "eval_strategy": "no", "save_strategy": "no", **NO_REPORTS}


def use_once(context: Context, arm: ArmPlan, seed: int) -> None:
    """One scored batch and one training step of a model that is thrown away, so that no arm's seconds hold the cost."""
    args = context.arguments(arm, seed, extra=ONE_STEP)
    model = context.starts(arm.arm, seed, args.device)
    # A dense arm may ask for more than there are.
    number = min(context.choice(arm).num_samples, len(context.data.train))
    loader = calibration_loader(context.plan, context.data, number, seed, args.per_device_train_batch_size)
    batches = list(islice(loader, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FishTuningWarning)  # of a model that nobody asked for
        # Before the step: after it, a learning rate that is too large would be told as a fault of the examples.
        calculate_fisher_information(model, batches, device=args.device, warmup_steps=0, progress=False)
    make_trainer(context, arm, model, args, []).train()
