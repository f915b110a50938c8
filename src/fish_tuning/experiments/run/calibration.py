"""The scores of one starting point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import TrainingArguments

from fish_tuning.errors import FishTuningError
from fish_tuning.experiments.records.run_record import ArmPlan
from fish_tuning.experiments.run.context import Context
from fish_tuning.experiments.run.measure import Stopwatch
from fish_tuning.scores.calculate import calculate_scores
from fish_tuning.training.as_trained import as_trained


@dataclass(frozen=True)
class Calibration:
    """Scores of one starting point, kept on the CPU between arms, and what they cost."""

    scores: dict[str, Tensor]
    seconds: float  # warm-up included
    initial_state: str

    def check_start(self, initial_state: str) -> None:
        """Refuse scores of another start than the one to be trained."""
        if self.initial_state != initial_state:
            raise FishTuningError("The scores belong to another starting point than the one to be trained.")


def calibrate(
    context: Context, arm: ArmPlan, seed: int, model: Any, args: TrainingArguments, initial_state: str
) -> Calibration:
    """Score the model; it is left as it was."""
    steps = context.config.warmup_steps(context.config.method_of(arm.arm))
    with Stopwatch() as watch:
        scores = score(context, arm, seed, model, args, warmup_steps=steps)
    return Calibration({name: tensor.cpu() for name, tensor in scores.items()}, watch.seconds, initial_state)


def score(
    context: Context, arm: ArmPlan, seed: int, model: Any, args: TrainingArguments, warmup_steps: int
) -> dict[str, Tensor]:
    """The scores that the arm's entries are judged by, of the model as it is, computed as training computes."""
    with as_trained(model, args):
        return calculate_scores(
            model,
            context.calibration_loader(arm, seed, args.per_device_train_batch_size),
            context.choice(arm).score,
            args.device,
            batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            warmup_steps=warmup_steps,
            seed=seed,
            progress=False,
        )
