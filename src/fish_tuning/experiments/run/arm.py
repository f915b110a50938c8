"""One arm with one seed: start, scores, mask, training, measurement, adapter."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed

from fish_tuning.errors import FishTuningError
from fish_tuning.experiments.config import arm_names
from fish_tuning.experiments.config.arm_names import ArmName
from fish_tuning.experiments.masks.mask_files import ADAPTER_FILE
from fish_tuning.experiments.models.building import state_digest
from fish_tuning.experiments.records.kept import kept_shares
from fish_tuning.experiments.records.record_files import Digests, adapter_digests, adapter_folder, run_name
from fish_tuning.experiments.records.run_record import ArmPlan, RunRecord
from fish_tuning.experiments.run.adalora import AdaLoraSchedule, entries_left
from fish_tuning.experiments.run.calibration import Calibration, calibrate, score
from fish_tuning.experiments.run.cards import as_used, run_facts
from fish_tuning.experiments.run.context import Context
from fish_tuning.experiments.run.loggers import open_loggers
from fish_tuning.experiments.run.measure import PeakMemory, Stopwatch, optimizer_state_bytes
from fish_tuning.experiments.run.plan import names_outside_pool
from fish_tuning.experiments.run.trainers import evaluate, make_trainer, whole_state
from fish_tuning.files.atomic import whole_folder
from fish_tuning.files.delta_file import DELTA_FILE_NAME
from fish_tuning.files.mask_file import MASK_FILE_NAME, save_mask
from fish_tuning.masks.budgets import matching_names
from fish_tuning.masks.create import create_mask_from_fisher
from fish_tuning.peft_methods import ADALORA
from fish_tuning.sharing.card import CardFacts
from fish_tuning.sharing.folder import complete_adapter
from fish_tuning.sparse.delta import save_delta
from fish_tuning.sparse.masked_tensors import Mask, count_trainable_parameters
from fish_tuning.training.trainer import FishMaskCallback


def run_arm(
    context: Context,
    arm: ArmPlan,
    seed: int,
    calibration: Calibration | None = None,
    learning_rate: float | None = None,
) -> tuple[RunRecord, Calibration | None]:
    """Do one run: its adapter is in its place when this returns, its record is the caller's to write.

    Args:
        context: what all runs share.
        arm: what to train.
        seed: of the head, the adapter, the data order and the mask's ties.
        calibration: of an earlier arm with the same start; made where one is needed and none is given.
        learning_rate: None leaves it to the training arguments.

    Returns:
        The record, and the calibration for the next arm with this start.

    Raises:
        Diverged: training left numbers that are not finite.
        FishTuningError: what was planned did not come out.
    """
    args = context.arguments(arm, seed, learning_rate)
    model = context.starts(arm.arm, seed, args.device)
    initial_state = state_digest(model)
    if needs_scores(arm):
        calibration = calibration or calibrate(context, arm, seed, model, args, initial_state)
        calibration.check_start(initial_state)
    mask = choose_mask(context, arm, seed, model, calibration)
    trained = train(context, arm, seed, model, args, mask, _figures(arm, calibration))
    mask = trained.mask  # the last one, where entries were chosen again
    saved = Saved()
    if args.process_index == 0 and not context.is_trial:
        about = About(as_used(context), run_facts(context, arm, seed, args, trained.metrics[context.plan.metric]))
        saved = save(model, mask, adapter_folder(context.folder, arm.arm, seed), trained.whole_state, about)
    return _record(context, arm, seed, args, mask, trained, saved, calibration, initial_state), calibration


def needs_scores(arm: ArmPlan) -> bool:
    return arm_names.needs_scores(arm.arm)


def choose_mask(context: Context, arm: ArmPlan, seed: int, model: Any, calibration: Calibration | None) -> Mask | None:
    """The arm's mask; None for an arm that trains all of its adapter, or none of it."""
    selection = ArmName.parse(arm.arm).selection
    if selection is None:
        return None
    if needs_scores(arm) and calibration is not None:
        scores = calibration.scores
    else:
        scores = {n: torch.zeros(()).expand(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    return _mask_of(context, arm, seed, scores)


def _mask_of(context: Context, arm: ArmPlan, seed: int, scores: Mapping[str, Tensor]) -> Mask:
    selection = ArmName.parse(arm.arm).selection
    if selection is None:
        raise FishTuningError(f"{arm.arm} is dense: it has no mask.")
    choice = context.choice(arm)
    return create_mask_from_fisher(
        scores,
        names_to_exclude=names_outside_pool(context.config, context.plan.task, arm.method, arm.settings),
        num_trainable=arm.trainable_parameters,
        method=selection.name,
        granularity=choice.granularity,
        quotas=(choice.quotas or "module_type") if selection.quotas else None,
        floors=None if selection.quotas else choice.floors,
        normalize="module_type" if selection.normalize else None,
        seed=seed,
    )


class Trained(NamedTuple):
    """What training and evaluation gave."""

    metrics: dict[str, float]
    seconds: float
    peak_memory_bytes: int
    peak_memory_of: str
    optimizer_state_bytes: int
    loss_curve: list[tuple[int, float]]
    mask: Mask | None  # that training ended with
    kept: int  # entries of the pool that are left, where fewer may be than at the start
    whole_state: dict[str, Any] | None  # the model's, where each process holds a part of it


def train(
    context: Context,
    arm: ArmPlan,
    seed: int,
    model: Any,
    args: TrainingArguments,
    mask: Mask | None,
    figures: dict[str, float],
) -> Trained:
    """Train and evaluate the model in place; `figures` go to the loggers."""
    checkpoints = context.checkpoints(arm, seed)
    if args.process_index == 0:
        shutil.rmtree(checkpoints, ignore_errors=True)  # of an earlier configuration
    callbacks = _callbacks(context, arm, seed, args, mask)
    trainer = make_trainer(context, arm, model, args, callbacks)
    _check_count(arm, count_trainable_parameters(model))
    set_seed(seed)  # the same data order and dropout in every arm, whatever scoring drew
    peak = PeakMemory(args.device)
    with open_loggers(trainer, context.folder / "logs" / run_name(arm.arm, seed), figures):
        with Stopwatch() as watch:
            trainer.train()
        peak_memory = peak.bytes()
        metrics = evaluate(context, trainer)
    if args.process_index == 0:
        if context.config.training.early_stopping_patience:
            shutil.rmtree(checkpoints, ignore_errors=True)
        _remove_empty(checkpoints)
    history = trainer.state.log_history
    return Trained(
        metrics,
        watch.seconds,
        peak_memory,
        peak.of,
        optimizer_state_bytes(trainer.optimizer) if trainer.optimizer else 0,
        [(int(entry["step"]), entry["loss"]) for entry in history if "loss" in entry],
        next((callback.mask for callback in callbacks if isinstance(callback, FishMaskCallback)), None),
        entries_left(model) if arm.method == ADALORA else arm.kept,
        None if context.is_trial else whole_state(trainer),
    )


def _callbacks(
    context: Context, arm: ArmPlan, seed: int, args: TrainingArguments, mask: Mask | None
) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [context.progress]
    if arm.method == ADALORA:
        callbacks.append(AdaLoraSchedule())
    if mask is not None:
        every = context.choice(arm).reselect_every if needs_scores(arm) else None

        def choose(model: Any) -> Mask:
            """By the scores of the model as it is trained so far."""
            return _mask_of(context, arm, seed, score(context, arm, seed, model, args, warmup_steps=0))

        callbacks.append(FishMaskCallback(mask, every, choose if every else None))
    if patience := context.config.training.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=patience))
    return callbacks


def _check_count(arm: ArmPlan, trainable: int) -> None:
    planned = arm.pool + arm.dense if arm.selection is None else arm.trainable_parameters
    if trainable != planned:
        raise FishTuningError(f"{arm.arm} trains {trainable:,} parameters where {planned:,} were planned.")


class Saved(NamedTuple):
    """Digests of what was saved, and the bytes of the adapter's weights file."""

    digests: Digests = Digests()
    adapter_bytes: int | None = None


class About(NamedTuple):
    """What lies beside an adapter that its model does not know."""

    processing_class: Any = None
    facts: CardFacts | None = None


NOTHING_MORE = About()


def save(
    model: Any,
    mask: Mask | None,
    folder: Path,
    whole_state: dict[str, Any] | None = None,
    about: About = NOTHING_MORE,
) -> Saved:
    """Put the adapter, as PEFT writes it, with its mask in the place of an earlier one, whole or not at all.

    What it needs to stand alone lies beside it: labels, tokenizer, card. A model without PEFT leaves a delta of its
    weights. `whole_state` is the model's, where it does not hold it whole.
    """
    with whole_folder(folder) as unfinished:
        if isinstance(model, PeftModel):
            with warnings.catch_warnings():  # AdaLoRA may cut all ranks of a layer, which PEFT takes for a shard's loss
                warnings.filterwarnings("ignore", message=".*zero-sized lora_A.*")
                model.save_pretrained(str(unfinished), state_dict=whole_state)
        else:
            save_delta(model, unfinished / DELTA_FILE_NAME, state_dict=whole_state)
        if mask is not None:
            save_mask(mask, unfinished / MASK_FILE_NAME)
        complete_adapter(model, unfinished, processing_class=about.processing_class, facts=about.facts)
        weights = ADAPTER_FILE if isinstance(model, PeftModel) else DELTA_FILE_NAME
        size = (unfinished / weights).stat().st_size
        digests = adapter_digests(unfinished)
    return Saved(digests, size)


def _remove_empty(checkpoints: Path) -> None:
    """The Trainer makes its folder even when it saves no checkpoint."""
    with contextlib.suppress(OSError):
        checkpoints.rmdir()
        checkpoints.parent.rmdir()


def _seconds(arm: ArmPlan, calibration: Calibration | None) -> float:
    """Of warm-up and scoring, for an arm that needs scores."""
    return 0.0 if calibration is None or not needs_scores(arm) else calibration.seconds


def _figures(arm: ArmPlan, calibration: Calibration | None) -> dict[str, float]:
    ratio = {} if arm.selection is None else {"keep_ratio": arm.kept / arm.pool}
    return {**ratio, "fisher_seconds": _seconds(arm, calibration)}


def _record(
    context: Context,
    arm: ArmPlan,
    seed: int,
    args: TrainingArguments,
    mask: Mask | None,
    trained: Trained,
    saved: Saved,
    calibration: Calibration | None,
    initial_state: str,
) -> RunRecord:
    config, plan = context.config, context.plan
    keys = context.keys(arm, seed, args.learning_rate)
    dense = matching_names(mask, names_outside_pool(config, plan.task, arm.method, arm.settings)) if mask else set()
    return RunRecord(
        arm=arm.arm,
        seed=seed,
        status="ok",
        metric=plan.metric,
        value=trained.metrics[plan.metric],
        metrics=trained.metrics,
        trainable_parameters=trained.kept + arm.dense,  # as they were counted on the model
        kept_parameters=trained.kept,
        head_parameters=arm.dense,
        train_seconds=trained.seconds,
        fisher_seconds=_seconds(arm, calibration),
        peak_memory_bytes=trained.peak_memory_bytes,
        peak_memory_of=trained.peak_memory_of,
        optimizer_state_bytes=trained.optimizer_state_bytes,
        adapter_bytes=saved.adapter_bytes,
        kept=kept_shares(mask, dense) if mask else [],
        config_hash=keys.run,
        setting=keys.setting,
        common=keys.common,
        method_own=keys.method_own,
        adapter_digest=saved.digests.adapter,
        mask_digest=saved.digests.mask,
        constant_value=plan.task.constant_value(context.data.train, context.data.validation),
        initial_state=initial_state,
        experiment=config.name,
        task=plan.task.name,
        model=config.model.name,
        keep_ratio=None if arm.selection is None else arm.kept / arm.pool,
        learning_rate=args.learning_rate,
        loss_curve=trained.loss_curve,
    )
