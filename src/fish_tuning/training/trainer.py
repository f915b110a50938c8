"""Masks in transformers' Trainer: one callback for every Trainer subclass, and a thin Trainer that brings it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fish_tuning.errors import MaskError
from fish_tuning.files.mask_file import MASK_FILE_NAME, load_mask, save_mask
from fish_tuning.sparse.applying import apply_mask, synchronize_mask
from fish_tuning.sparse.masked_tensors import get_mask, is_masked, replaced_parameters
from fish_tuning.training.reporting import report_figures


class FishMaskCallback(TrainerCallback):
    """Applies a mask when a Trainer (SFTTrainer, or any other subclass) has been made, before its optimizer is.

    Every checkpoint gets the mask beside it as `fish_mask.safetensors`; the adapter in it stays an ordinary PEFT
    adapter. `report_figures(trainer)` brings the mask's figures into the loggers that `report_to` names.

    Args:
        mask: {parameter name: bool tensor}, from `create_mask_from_fisher`.

    Raises:
        MaskError: when the mask does not fit the model, or when training starts with an optimizer that was made before
            the mask was applied.

    Example:
        >>> trainer = SFTTrainer(model=peft_model, ..., callbacks=[FishMaskCallback(mask)])  # doctest: +SKIP
    """

    def __init__(self, mask: Mapping[str, Tensor]) -> None:
        self.mask = dict(mask)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if not is_masked(model):
            apply_mask(model, self.mask)
        elif not self._is_applied_to(model):
            raise MaskError(
                "The model has another mask already. Call remove_mask(model) before training with this one."
            )

    def _is_applied_to(self, model: Any) -> bool:
        applied = get_mask(model)
        dense = {name: selected for name, selected in applied.items() if name not in self.mask and selected.all()}
        return same_mask(applied, {**dense, **self.mask})

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        held = (
            {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} if optimizer else set()
        )
        if not is_masked(model) and not all(selected.all() for selected in self.mask.values()):
            raise MaskError(
                "The model that is trained has no mask: the callback was added after the Trainer was made, the model "
                "was replaced (model_init?), or the mask was removed. Pass model and callback when making the Trainer."
            )
        if optimizer is not None and (held.isdisjoint(trained) or held & replaced_parameters(model)):
            raise MaskError(
                "The optimizer holds parameters that a mask has replaced: it was made before the mask was applied. "
                "Call apply_mask(model, mask) first, then make the optimizer."
            )

        if state.global_step:  # resumed; a checkpoint that lies elsewhere is FishTuningTrainer.train's to check
            check_checkpoint(_checkpoint_folder(args, state), self.mask)
        synchronize_mask(model)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = _checkpoint_folder(args, state)
        if state.is_world_process_zero and folder.is_dir():
            save_mask(self.mask, folder / MASK_FILE_NAME)


class FishTuningTrainer(Trainer):
    """transformers' Trainer that trains only the entries a mask selects; all its other arguments are Trainer's own.

    The number of trainable parameters and the keep ratio go with the logs to all that `report_to` names.

    Args:
        model: the PEFT model (or any model) the mask was made for; `apply_mask` changes it in place.
        args: TrainingArguments.
        mask: {parameter name: bool tensor}, from `create_mask_from_fisher`.
        figures: further figures to log, such as `{"fisher_seconds": seconds}`; see `report_figures`.
        **kwargs: everything else that Trainer takes (`train_dataset`, `processing_class`, `data_collator`, ...), but
            `model_init`: a mask belongs to one model.

    Raises:
        MaskError: the mask does not fit the model, or the checkpoint to resume from was trained with another mask.

    Example:
        >>> trainer = FishTuningTrainer(
        ...     model=peft_model, args=training_args, mask=mask, train_dataset=train_dataset
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        mask: Mapping[str, Tensor],
        figures: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("model_init") is not None:
            raise MaskError("FishTuningTrainer takes no model_init: a mask belongs to the one model it was made for.")
        callbacks = [FishMaskCallback(mask), *(kwargs.pop("callbacks", None) or ())]
        self.mask = dict(mask)
        super().__init__(model=model, args=args, callbacks=callbacks, **kwargs)
        report_figures(self, figures)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(resume_from_checkpoint, str | Path):
            check_checkpoint(Path(resume_from_checkpoint), self.mask)
        return super().train(resume_from_checkpoint, *args, **kwargs)


def check_checkpoint(folder: Path, mask: Mapping[str, Tensor]) -> None:
    """Raise MaskError when the checkpoint in `folder` was trained with another mask than `mask`."""
    path = folder / MASK_FILE_NAME
    if path.is_file() and not same_mask(load_mask(path), mask):
        raise MaskError(
            f"The checkpoint {str(folder)!r} was trained with another mask than the one given. Use "
            f"load_mask({str(path)!r}) to go on with its own."
        )


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or "", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def same_mask(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two masks select the same entries of the same tensors, on whatever devices."""
    return one.keys() == other.keys() and all(torch.equal(one[name].cpu(), other[name].cpu()) for name in one)
