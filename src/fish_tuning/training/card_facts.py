"""What a Trainer tells of its training on the card of whatever adapter is saved then and after it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from transformers import TrainerState, TrainingArguments

from fish_tuning.sharing.card import CardFacts

_NOT_MEASURED = ("runtime", "samples_per_second", "steps_per_second", "preparation_time")  # of speed alone


def training_facts(args: TrainingArguments, state: TrainerState, rows: Mapping[str, str]) -> CardFacts:
    """The facts of a training up to now: `rows`, its arguments, and what was measured last."""
    history = state.log_history
    measured = next((entry for entry in reversed(history) if any(key.startswith("eval_") for key in entry)), {})
    told = {k.removeprefix("eval_"): v for k, v in measured.items() if k.startswith("eval_")}
    figures = [f"{k} {v:.4g}" for k, v in told.items() if isinstance(v, float) and not k.endswith(_NOT_MEASURED)]
    training = (
        f"{state.global_step} steps, learning_rate {args.learning_rate:g}, batches of {args.train_batch_size}, "
        f"seed {args.seed}"
    )
    result = f"{', '.join(figures)} on the evaluation set, with one seed." if figures else ""
    return CardFacts(rows={**rows, "training": training}, result=result)


def data_rows(loader: Any) -> dict[str, str]:
    """How many examples a loader of training data has, where it knows; their name may be nobody else's affair."""
    data: Any = getattr(loader, "dataset", None)
    with suppress(TypeError, NotImplementedError):  # of what has no length
        return {"training data": f"{len(data):,} examples"}
    return {}
