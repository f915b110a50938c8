"""The Trainer that every arm is trained and measured by."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import TrainerCallback

from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.run.context import make_context
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.trainers import evaluate, make_trainer


@pytest.mark.parametrize("size", [16, 64])
def test_rows_are_dropped_from_training_alone(experiment: Callable[..., ExperimentConfig], size: int) -> None:
    own = f"training.args_override={{dataloader_drop_last: true, per_device_eval_batch_size: {size}, use_cpu: true}}"
    config = experiment(own)
    context = make_context(config, plan_experiment(config), TrainerCallback())
    arm = context.plan.arms[0]
    args = context.arguments(arm, 1)
    trainer = make_trainer(context, arm, context.starts(arm.arm, 1, args.device), args, [])
    rows = sum(len(batch["labels"]) for batch in trainer.get_eval_dataloader())
    assert rows == len(context.data.validation) == 24
    assert evaluate(context, trainer)["loss"] > 0
    assert args.dataloader_drop_last
