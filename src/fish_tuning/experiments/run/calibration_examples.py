"""The examples that are scored, and that starts which look at data look at."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from fish_tuning.experiments.data.tasks import Encoded
from fish_tuning.experiments.run.plan import Plan


def calibration_loader(plan: Plan, data: Encoded, num_samples: int, seed: int, batch_size: int) -> DataLoader[Any]:
    """The seed's calibration examples; scores are exact whatever their order, so equal lengths go together."""
    examples = data.train.shuffle(seed=seed).select(range(num_samples))
    if "input_ids" in examples.column_names:
        lengths = [len(ids) for ids in examples["input_ids"]]
        examples = examples.select(sorted(range(len(examples)), key=lengths.__getitem__))
    collator = plan.task.collator(plan.processing_class)
    return DataLoader(examples, batch_size=batch_size, collate_fn=collator)
