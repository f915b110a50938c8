from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import assert_same_tensors, tensors
from transformers import TrainerCallback

from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.run.calibration import calibrate
from fish_tuning.experiments.run.context import make_context
from fish_tuning.experiments.run.first_use import use_once
from fish_tuning.experiments.run.plan import plan_experiment

MakeExperiment = Callable[..., ExperimentConfig]


@pytest.mark.parametrize("mixed", ["bf16=false", "bf16=true"])
def test_a_calibrated_model_is_as_it_was(experiment: MakeExperiment, mixed: str) -> None:
    config = experiment("fish_tuning.warmup_steps=2", f"training.args_override.{mixed}")
    context = make_context(config, plan_experiment(config), TrainerCallback())
    arm = context.plan.arms[1]
    model = context.starts(arm.arm, 1)
    before = tensors(model)
    calibration = calibrate(context, arm, 1, model, context.arguments(arm, 1), "start")
    assert_same_tensors(tensors(model), before)
    assert not {"forward", "_original_forward"} & vars(model).keys()
    assert {scores.device.type for scores in calibration.scores.values()} == {"cpu"}
    assert all(scores.dtype == torch.float32 for scores in calibration.scores.values())


def calibrated(experiment: MakeExperiment, *overrides: str) -> dict[str, torch.Tensor]:
    config = experiment("fish_tuning.warmup_steps=2", *overrides)
    context = make_context(config, plan_experiment(config), TrainerCallback())
    arm = context.plan.arms[1]
    return calibrate(context, arm, 1, context.starts(arm.arm, 1), context.arguments(arm, 1), "start").scores


def test_scores_are_of_the_precision_that_trains(experiment: MakeExperiment) -> None:
    plain, mixed = calibrated(experiment), calibrated(experiment, "training.args_override.bf16=true")
    assert any(not torch.equal(plain[name], score) for name, score in mixed.items())
    differences = sum(float((mixed[name] - score).abs().sum()) for name, score in plain.items())
    assert differences < 0.1 * sum(float(score.sum()) for score in plain.values())


def test_checkpointing_changes_no_score(experiment: MakeExperiment) -> None:
    checkpoints = "training.args_override.activation_checkpointing=true"
    assert_same_tensors(calibrated(experiment, checkpoints), calibrated(experiment))


def test_first_steps_leave_the_next_start_alone(experiment: MakeExperiment) -> None:
    config = experiment("lora.init_lora_weights=pissa")
    context = make_context(config, plan_experiment(config), TrainerCallback())
    before = tensors(context.starts("lora-fish", 1))
    use_once(context, context.plan.arms[1], 1)
    assert_same_tensors(tensors(context.starts("lora-fish", 1)), before)


def test_first_steps_need_no_more_examples_than_there_are(experiment: MakeExperiment) -> None:
    config = experiment("fish_tuning.num_samples=128", "fish_tuning.methods_to_run=[lora]")
    context = make_context(config, plan_experiment(config), TrainerCallback())
    use_once(context, context.plan.arms[0], 1)


def test_a_learning_rate_that_is_too_large_is_no_fault_of_the_examples(experiment: MakeExperiment) -> None:
    config = experiment("training.args_override.learning_rate=1e30")
    context = make_context(config, plan_experiment(config), TrainerCallback())
    use_once(context, context.plan.arms[0], 1)  # raises nothing: what diverges is told by the arm itself
