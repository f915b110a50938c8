from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import assert_same_tensors, bert, lora, tensors
from torch import nn
from transformers import TrainerCallback

from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.run.calibration import calibrate, undone
from fish_tuning.experiments.run.context import make_context
from fish_tuning.experiments.run.first_use import use_once
from fish_tuning.experiments.run.plan import plan_experiment

MakeExperiment = Callable[..., ExperimentConfig]


def test_buffers_are_put_back_too() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.register_buffer("unsaved", torch.ones(2), persistent=False)
    model[0].weight.requires_grad_(False)
    before = tensors(model)
    with undone(model):
        model(torch.randn(8, 3)).sum().backward()
        with torch.no_grad():
            model[0].bias.add_(1)
            model.unsaved.zero_()  # type: ignore[operator]
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])  # type: ignore[arg-type]
    assert_same_tensors(tensors(model), before)
    assert torch.equal(model.unsaved, torch.ones(2))  # type: ignore[arg-type]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_is_undone_too() -> None:
    model = lora(bert())
    before = tensors(model)

    def interrupted() -> None:
        with undone(model), torch.no_grad():
            next(parameter for parameter in model.parameters() if parameter.requires_grad).zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_same_tensors(tensors(model), before)


def test_copies_are_of_trained_tensors_and_buffers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, copied = lora(bert()), 0
    to = torch.Tensor.to

    def counted(self: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        nonlocal copied
        copied += self.numel() if options.get("copy") else 0
        return to(self, *arguments, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(torch.Tensor, "to", counted)
    with undone(model):
        pass
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert copied == trained + sum(buffer.numel() for buffer in model.buffers())


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


def test_first_steps_leave_the_next_start_alone(experiment: MakeExperiment) -> None:
    config = experiment("lora.init_lora_weights=pissa")
    context = make_context(config, plan_experiment(config), TrainerCallback())
    before = tensors(context.starts("lora-fish", 1))
    use_once(context, context.plan.arms[1], 1)
    assert_same_tensors(tensors(context.starts("lora-fish", 1)), before)
