"""The mask's figures in TensorBoard, W&B, MLflow, trackio, or whatever else a Trainer's `report_to` names."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fish_tuning.sparse.masked_tensors import count_trainable_parameters, get_mask, is_masked

HEAD = "modules_to_save"  # how PEFT names what trains as a whole, outside the pool


def report_figures(trainer: Trainer, figures: Mapping[str, float] | None = None) -> None:
    """Have a Trainer log the mask's figures whenever its training begins.

    They go the way of the Trainer's own logs: to all that `report_to` names, under `train/` as the loss does, and into
    the log history. A Trainer's callbacks cannot reach those that report, so this takes the
    Trainer; `FishTuningTrainer` calls it for itself. Called again, it replaces what was given before.

    - `trainable_parameters`: how many entries train, the head included.
    - `keep_ratio`: share of the pool that is kept, for a masked model. The pool is taken to be everything trainable but
      PEFT's `modules_to_save`; where the mask was made with other exclusions, give the number in `figures`.

    Args:
        trainer: any Trainer (SFTTrainer, or another subclass), with its mask applied; without one, the first figure
            alone is logged.
        figures: further ones by name, such as `fisher_seconds`; they win over those above.

    Example:
        >>> trainer = SFTTrainer(model=peft_model, ..., callbacks=[FishMaskCallback(mask)])  # doctest: +SKIP
        >>> report_figures(trainer, {"fisher_seconds": seconds})  # doctest: +SKIP
    """
    # Counted now, because FSDP and DeepSpeed leave each process a part of the model.
    counted = mask_figures(cast(nn.Module, trainer.model))
    trainer.remove_callback(_LogFigures)
    trainer.add_callback(_LogFigures(trainer, {**counted, **(figures or {})}))


def mask_figures(model: nn.Module) -> dict[str, float]:
    """`trainable_parameters`, and `keep_ratio` where a mask is applied."""
    figures: dict[str, float] = {"trainable_parameters": count_trainable_parameters(model)}
    pool = [selected for name, selected in get_mask(model).items() if HEAD not in name] if is_masked(model) else []
    if pool:
        kept = sum(int(selected.sum()) for selected in pool)
        figures["keep_ratio"] = kept / sum(selected.numel() for selected in pool)
    return figures


class _LogFigures(TrainerCallback):
    """Added last, so the callbacks that report have opened their runs by the time it logs."""

    def __init__(self, trainer: Trainer, figures: Mapping[str, float]) -> None:
        self.trainer = weakref.ref(trainer)  # a cycle would keep the model in memory when the trainer is gone
        self.figures = dict(figures)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer = self.trainer()
        if trainer is not None:
            trainer.log(dict(self.figures))  # a copy: the Trainer writes the epoch into it
