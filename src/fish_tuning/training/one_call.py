"""A mask for a Trainer that is made already, and all three steps in one call."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer

from fish_tuning.errors import ConfigurationError, FisherError, MaskError
from fish_tuning.files.mask_file import MASK_FILE_NAME, load_mask
from fish_tuning.masks.budgets import matching_names, resolve_budget
from fish_tuning.masks.create import create_mask_from_fisher
from fish_tuning.scores.bare_model import unwrapped
from fish_tuning.scores.calculate import calculate_scores
from fish_tuning.scores.named import SCORES
from fish_tuning.sparse.applying import apply_mask
from fish_tuning.sparse.masked_tensors import is_masked, trains_masked
from fish_tuning.training.as_trained import as_trained
from fish_tuning.training.calibration import calibration_of
from fish_tuning.training.checkpoints import find_fault, last_checkpoint
from fish_tuning.training.head_rate import check_head_learning_rate, set_head_learning_rate
from fish_tuning.training.reporting import HEAD, report_figures
from fish_tuning.training.smaller_batches import in_batches_that_fit
from fish_tuning.training.trainer import FishMaskCallback

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def add_mask(trainer: Trainer, mask: Mapping[str, Tensor]) -> None:
    """Give a mask to a Trainer that is made already, before `train()`.

    trl's trainers make the PEFT model themselves (`peft_config=`), so there is no model to score before there is a
    Trainer. This does what `callbacks=[FishMaskCallback(mask)]` does where the mask is there first: it applies the mask
    to the Trainer's model, has every checkpoint hold it, and brings its figures into the logs.

    Args:
        trainer: any Trainer (SFTTrainer, or another subclass) that has not made its optimizer yet.
        mask: {parameter name: bool tensor}, from `create_mask_from_fisher`.

    Raises:
        MaskError: the mask does not fit the model, the model has one already, or the Trainer has its optimizer already
            or makes its model anew (`model_init`). The Trainer is then unchanged.

    Example:
        >>> trainer = SFTTrainer(model="Qwen/Qwen3-0.6B", peft_config=LoraConfig(), ...)  # doctest: +SKIP
        >>> scores = calculate_fisher_information(trainer.model, **calibration_of(trainer))  # doctest: +SKIP
        >>> add_mask(trainer, create_mask_from_fisher(scores, keep_ratio=0.25))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
    _check_new(trainer)
    callback = FishMaskCallback(mask)
    apply_mask(cast(nn.Module, trainer.model), mask)
    trainer.add_callback(callback)
    report_figures(trainer)


def fish_tune(
    trainer: AnyTrainer,
    keep_ratio: float | None = None,
    *,
    num_trainable: int | None = None,
    num_samples: int = 128,
    score: str = "fisher",
    names_to_exclude: Sequence[str] | None = None,
    head_learning_rate: float | None = None,
    resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
    progress: bool = True,
) -> AnyTrainer:
    """Score what a Trainer trains, keep the entries that matter, and train these: all three steps in one call.

    It is `calculate_scores(trainer.model, **calibration_of(trainer))`, `create_mask_from_fisher`, `add_mask` and
    `trainer.train()`, with the defaults that measured best or at least no worse (docs/selection.md,
    docs/initialisation.md): Fisher information of 128 training examples, after 20 warm-up steps that are undone where
    half of the pool would score zero; the head trains as a whole. With `auto_find_batch_size=True`, scoring that runs
    out of memory begins again in batches of half the size.

    Args:
        trainer: a Trainer that is ready to train: transformers' own, or trl's SFTTrainer, DPOTrainer, RewardTrainer or
            GRPOTrainer, with its model, its data and its arguments.
        keep_ratio: share of the pool to keep. No default: how much is enough depends on the task.
        num_trainable: instead of `keep_ratio`, the exact number of trainable parameters in all, head included.
        num_samples: examples to score; see `calibration_of` for what an example is.
        score: a registered score's name; see `calculate_scores`.
        names_to_exclude: regular expressions for what trains as a whole, outside the pool. Default: PEFT's
            `modules_to_save`, which is the classifier of a classification model.
        head_learning_rate: a learning rate of its own for the head; see `set_head_learning_rate`. A few entries bear
            several times the rate of the head.
        resume_from_checkpoint: True for the newest whole checkpoint in `output_dir`, or a checkpoint's folder. Its mask
            is trained on with, and nothing is scored. True where there is no checkpoint starts anew.
        progress: show a progress bar while scoring.

    Returns:
        The trainer, trained. `get_mask(trainer.model)` is its mask; `trainer.save_model(folder)` writes an ordinary
        adapter with the mask beside it.

    Raises:
        ConfigurationError: not exactly one of `keep_ratio` and `num_trainable`, or as `calibration_of`.
        FisherError: as `calculate_scores`.
        MaskError: as `create_mask_from_fisher`, `add_mask` and `set_head_learning_rate`, or a checkpoint to resume from
            that is not whole or has no mask. What the arguments alone tell is told before anything is computed.

    Example:
        >>> trainer = Trainer(get_peft_model(model, LoraConfig()), args, train_dataset=rows)  # doctest: +SKIP
        >>> fish_tune(trainer, keep_ratio=0.25).save_model("adapter")  # doctest: +SKIP
    """
    if (keep_ratio is None) == (num_trainable is None):
        raise ConfigurationError(
            f"keep_ratio={keep_ratio!r}, num_trainable={num_trainable!r}: give one of the two, a share of the pool or "
            "the number of trainable parameters."
        )
    _check_new(trainer)
    model = cast(nn.Module, trainer.model)
    excluded = head_names(model) if names_to_exclude is None else names_to_exclude
    _check_arguments(model, keep_ratio, num_trainable, score, excluded, head_learning_rate)
    checkpoint = _checkpoint(trainer, resume_from_checkpoint)
    if checkpoint is not None:
        mask = _mask_of(checkpoint)
    else:
        scores = _scores(trainer, calibration_of(trainer, num_samples), score, progress)
        mask = create_mask_from_fisher(scores, keep_ratio, excluded, num_trainable=num_trainable)
    add_mask(trainer, mask)
    if checkpoint is None:
        callback = next(each for each in trainer.callback_handler.callbacks if isinstance(each, FishMaskCallback))
        callback.rows["score"] = f"{score}, on up to {num_samples} training examples"  # for the adapter's card
    if head_learning_rate is not None:
        set_head_learning_rate(trainer, head_learning_rate)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def _scores(trainer: Trainer, calibration: dict[str, Any], score: str, progress: bool) -> dict[str, Tensor]:
    args, model = trainer.args, cast(nn.Module, trainer.model)
    step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def scored(calibration: dict[str, Any]) -> dict[str, Tensor]:
        with as_trained(model, args):
            return calculate_scores(model, **calibration, score=score, batch_size=step, progress=progress)

    return in_batches_that_fit(trainer, calibration, scored)


def head_names(model: nn.Module) -> list[str]:
    """`names_to_exclude` for a PEFT model's head, its trainable `modules_to_save`; empty where it has none."""
    found = any(HEAD in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return [HEAD] if found else []


def _check_arguments(
    model: nn.Module,
    keep_ratio: float | None,
    num_trainable: int | None,
    score: str,
    excluded: Sequence[str],
    head_learning_rate: float | None,
) -> None:
    """What scoring, choosing and training would refuse, told before the minutes that scoring may take."""
    SCORES.find(score, "score", FisherError)
    model = unwrapped(model)  # whose names the scores have
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not sizes or not all(sizes.values()):
        return  # nothing trains, or ZeRO-3 holds the tensors: scoring says so before it begins
    whole = matching_names(sizes, excluded)
    dense = sum(sizes[name] for name in whole)
    resolve_budget(sum(sizes.values()) - dense, dense, keep_ratio=keep_ratio, num_trainable=num_trainable)
    if head_learning_rate is not None:
        # Without PEFT the head is what a mask leaves dense, and there is no mask yet.
        head = None if isinstance(model, PeftModel) else [f"^{re.escape(name)}$" for name in whole]
        check_head_learning_rate(model, head_learning_rate, head)


def _check_new(trainer: Trainer) -> None:
    if getattr(trainer, "model_init", None) is not None:
        raise MaskError(
            "The Trainer makes its model anew when it trains (model_init), and that one would have no mask. Pass "
            "model= to it, or use FishTuningTrainer(model_init=..., mask=...), which masks what it makes."
        )
    if trainer.optimizer is not None:
        raise MaskError(
            "The Trainer has its optimizer already, which holds the whole tensors. Add the mask before train(), to a "
            "Trainer that was made without optimizers=."
        )
    reference: Any = getattr(trainer, "ref_model", None)
    if getattr(trainer.args, "sync_ref_model", False) and reference is not None and not is_masked(reference):
        raise MaskError(
            "sync_ref_model=True copies the parameters one after another, and masked tensors have fewer entries than "
            "those of the reference model. apply_mask(trainer.ref_model, mask) first, with the same mask."
        )
    if trains_masked(cast(nn.Module, trainer.model)):
        raise MaskError(
            "The Trainer's model has a mask already. Call remove_mask(trainer.model) before adding another."
        )


def _checkpoint(trainer: Trainer, resume_from_checkpoint: str | os.PathLike[str] | bool | None) -> str | None:
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is True:
        return last_checkpoint(trainer.args.output_dir or "")
    if fault := find_fault(Path(resume_from_checkpoint)):
        raise MaskError(f"{fault[:1].upper()}{fault[1:]}. Give another checkpoint to resume from.")
    return os.fspath(resume_from_checkpoint)


def _mask_of(checkpoint: str) -> dict[str, Any]:
    folder = Path(checkpoint)
    paths = sorted([*folder.glob(MASK_FILE_NAME), *folder.glob(f"*/{MASK_FILE_NAME}")])
    if not paths:
        raise MaskError(f"The checkpoint {checkpoint!r} has no {MASK_FILE_NAME}: it was trained without a mask.")
    return {name: tensor for path in paths for name, tensor in load_mask(path).items()}
