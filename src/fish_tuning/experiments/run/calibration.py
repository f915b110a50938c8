"""The scores of one starting point: some dense steps where the start needs them, the scores, and all is undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments, set_seed

from fish_tuning.errors import FishTuningError
from fish_tuning.experiments.records.run_record import ArmPlan
from fish_tuning.experiments.run.context import Context
from fish_tuning.experiments.run.loggers import NO_REPORTS
from fish_tuning.experiments.run.measure import Stopwatch
from fish_tuning.experiments.run.trainers import make_trainer
from fish_tuning.scores.named import SCORES


@dataclass(frozen=True)
class Calibration:
    """Scores of one starting point, kept on the CPU between arms, and what they cost."""

    scores: dict[str, Tensor]
    warmup_seconds: float
    scoring_seconds: float
    initial_state: str

    def check_start(self, initial_state: str) -> None:
        """Refuse scores of another start than the one to be trained."""
        if self.initial_state != initial_state:
            raise FishTuningError("The scores belong to another starting point than the one to be trained.")


def calibrate(
    context: Context, arm: ArmPlan, seed: int, model: Any, args: TrainingArguments, initial_state: str
) -> Calibration:
    """Score the model; it is left as it was."""
    steps = context.config.warmup_steps(arm.method)
    loader = context.calibration_loader(seed, args.per_device_train_batch_size)
    warmup, scoring = Stopwatch(), Stopwatch()
    with undone(model):
        if steps:
            with warmup:
                train_steps(context, arm, seed, model, args.learning_rate, steps)
        with scoring:
            score = SCORES.find(context.config.fish_tuning.score, "fish_tuning.score")
            scores = score(model, loader, device=args.device, seed=seed)
    scores = {name: tensor.cpu() for name, tensor in scores.items()}
    return Calibration(scores, warmup.seconds, scoring.seconds, initial_state)


def train_steps(context: Context, arm: ArmPlan, seed: int, model: Any, learning_rate: float, steps: int) -> None:
    """Some dense steps, so that no factor is zero when it is scored."""
    settings = {"max_steps": steps, "eval_strategy": "no", "save_strategy": "no", **NO_REPORTS}
    arguments = context.arguments(arm, seed, learning_rate, settings)
    set_seed(seed)
    trainer = make_trainer(context, model, arguments, [])
    trainer.train()
    # In 16 bits accelerate wraps the forward pass; what is scored and trained later must be the bare model.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)


@contextmanager
def undone(model: Any) -> Iterator[None]:
    """Whatever the block does to trained tensors and buffers is undone at its end, bit for bit."""
    with torch.no_grad():
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        before = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in tensors.items()
            if tensor.requires_grad or not isinstance(tensor, torch.nn.Parameter)
        }
    own_forward = vars(model).get("forward")
    try:
        yield
    finally:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for name, tensor in before.items():
                tensors[name].copy_(tensor)
        model.zero_grad(set_to_none=True)
        if own_forward is None:
            vars(model).pop("forward", None)
