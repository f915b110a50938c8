"""The scores of one starting point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from fish_tuning.errors import FishTuningError
from fish_tuning.experiments.records.run_record import ArmPlan
from fish_tuning.experiments.run.context import Context
from fish_tuning.experiments.run.measure import Stopwatch
from fish_tuning.scores.calculate import calculate_scores


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
    choice = context.choice(arm)
    steps = context.config.warmup_steps(context.config.method_of(arm.arm))
    loader = calibration_loader(context, seed, choice.num_samples, args.per_device_train_batch_size)
    with Stopwatch() as watch:
        scores = calculate_scores(
            model,
            loader,
            choice.score,
            args.device,
            batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            warmup_steps=steps,
            seed=seed,
            progress=False,
        )
    return Calibration({name: tensor.cpu() for name, tensor in scores.items()}, watch.seconds, initial_state)


def calibration_loader(context: Context, seed: int, number: int, batch_size: int) -> DataLoader[Any]:
    """The seed's calibration examples; scores are exact whatever their order, so equal lengths go together."""
    examples = context.data.train.shuffle(seed=seed).select(range(number))
    if "input_ids" in examples.column_names:
        lengths = [len(ids) for ids in examples["input_ids"]]
        examples = examples.select(sorted(range(len(examples)), key=lengths.__getitem__))
    collator = context.plan.task.collator(context.plan.processing_class)
    return DataLoader(examples, batch_size=batch_size, collate_fn=collator)
