"""What a plan tells its reader: facts of data, model, methods, scores and machine, and notes on the arms."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from transformers import TrainingArguments

from fish_tuning.experiments.compare.comparisons import near
from fish_tuning.experiments.config.arm_names import HEAD_ALONE, ArmName, needs_scores
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.methods import STARTS_AT_ZERO
from fish_tuning.experiments.data.tasks import Task
from fish_tuning.experiments.models.base_weights import settings_of
from fish_tuning.experiments.models.meta_models import MetaModels
from fish_tuning.experiments.models.peft_methods import size_text
from fish_tuning.experiments.models.quantized import BITSANDBYTES, Quantization, is_installed
from fish_tuning.experiments.records.run_record import ArmPlan
from fish_tuning.peft_methods import peft_method

RECORDED_PACKAGES = ("fish-tuning", "torch", "transformers", "peft", "datasets")


def plan_facts(
    config: ExperimentConfig, task: Task, models: MetaModels, quantization: Quantization | None
) -> dict[str, Any]:
    """What a plan tells of its data, model, methods, scores and machine, by the names that reports have for it."""
    first = {ArmName.parse(arm).method: arm for arm in reversed(config.arms)}
    first = {section.name: first[section.name] for section in config.peft if section.name in first}
    scores = _scores_text(config)
    return {
        "task": task.name,
        "task_kind": task.kind,
        "metric": task.metric,
        "train_examples": len(task.train),
        "validation_examples": len(task.validation),
        "validation_split": task.validation_split,
        "columns": list(task.used_columns),
        "num_labels": task.num_labels,
        "model_revision": getattr(models.model_config, "_commit_hash", None),
        "model_type": models.model_config.model_type,
        **({"quantization": quantization.text} if quantization else {}),
        **({"device_map": config.model.device_map} if config.model.device_map is not None else {}),
        "protocol": config.protocol,
        "adapters": {method: _sizes(config, method, models) for method in first},
        "target_modules": {method: _targets(models(arm)) for method, arm in first.items()},
        "init_lora_weights": _starts(config, first),
        "scores": scores,
        "num_samples": config.fish_tuning.num_samples,
        "warmup_steps_before_scoring": {
            name: config.warmup_steps_done(config.method_of(arm)) for name, arm in first.items() if name in scores
        },
        "device": _device(),
        "versions": {name: version(name) for name in _recorded_packages(task, quantization)}
        | {"python": platform.python_version()},
    }


def _starts(config: ExperimentConfig, first: Mapping[str, str]) -> Any:
    """`init_lora_weights` of the methods' adapters: one where all agree, else each."""
    starts = {name: config.initialisation(arm) for name, arm in first.items()}
    taken = {name: start for name, start in starts.items() if start is not None}
    agree = len({str(start) for start in taken.values()}) < 2
    return next(iter(taken.values()), None) if agree else taken


def _scores_text(config: ExperimentConfig) -> dict[str, str]:
    """What the entries of each method with masked arms are judged by."""
    found: dict[str, dict[str, int]] = {}
    for name in map(ArmName.parse, config.arms):
        if name.selection is not None:
            choice = config.choice_of_arm(str(name))
            found.setdefault(name.method, {})[choice.score] = choice.num_samples
    return {
        method: f"{', '.join(scores)} of {next(iter(scores.values()))} examples" for method, scores in found.items()
    }


def _recorded_packages(task: Task, quantization: Quantization | None) -> tuple[str, ...]:
    trainer = ("trl",) if task.kind == "causal_lm" else ()
    quantizer = (BITSANDBYTES,) if quantization and quantization.method == BITSANDBYTES else ()
    return (*RECORDED_PACKAGES, *trainer, *(quantizer if is_installed(quantization) else ()))


def _sizes(config: ExperimentConfig, method: str, models: MetaModels) -> str:
    """The sizes of a method's adapters, with what they are for where there are several."""
    arms = [arm for arm in config.arms if ArmName.parse(arm).method == method]
    dense, masked = (
        [size_text(models.settings(arm)) for arm in arms if (ArmName.parse(arm).selection is None) == is_dense]
        for is_dense in (True, False)
    )
    if len({*dense, *masked}) > 1:
        return f"{dense[0]} (dense), {masked[0]} (pool of the masked arms)"
    return "one size" if (dense or masked)[0] == "-" else (dense or masked)[0]


def _targets(model: Any) -> list[str] | str | None:
    targets = getattr(settings_of(model), "target_modules", None)
    return sorted(targets) if isinstance(targets, set | list) else targets


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({torch.get_num_threads()} threads)"


def loss_notes(of_methods: Iterable[TrainingArguments], arms: Sequence[ArmPlan]) -> list[str]:
    """Where arms train on another loss than the one that their entries are scored by, as `fish_tune` tells it."""
    smoothed = dict.fromkeys(args.label_smoothing_factor for args in of_methods if args.label_smoothing_factor)
    if not any(map(needs_scores, (arm.arm for arm in arms))):
        return []
    return [
        f"label_smoothing_factor={factor:g}: the Trainer trains on a loss of its own, and entries are scored by the "
        "model's. Leave it out of training.args_override for scores of the loss that is trained."
        for factor in smoothed
    ]


def plan_notes(config: ExperimentConfig, task: Task, arms: Sequence[ArmPlan]) -> list[str]:
    """What a reader should know of the arms before they run: what is left out, blind, of another size or unmasked."""
    notes = []
    if HEAD_ALONE in config.arms and not task.brings_head:
        notes.append(f"The arm {HEAD_ALONE} is left out: {task.kind} brings no new head to train.")
    blind = [
        section
        for section in config.peft
        if peft_method(section.method).takes_init_lora_weights
        and config.pool_initialisation(section) in STARTS_AT_ZERO
        and not config.freezes_A(section)
        and not config.warmup_steps(section)
    ]
    if blind:
        notes.append(
            "B starts at 0, where every A scores exactly zero: FISH can only choose among B. Leave out "
            "fish_tuning.warmup_steps=0, or set lora.init_lora_weights to 'pissa'."
        )
    if config.protocol == "fixed_count":
        counts = config.fish_tuning.kept_parameters
        dense = [arm for arm in arms if arm.selection is None and arm.pool]
        others = [arm for arm in dense if not any(near(count, [arm.kept]) for count in counts)]
        if others:
            sizes = ", ".join(f"{arm.arm} ({arm.kept:,})" for arm in others)
            notes.append(f"Dense arms of another size than fish_tuning.kept_parameters={counts}: {sizes}.")
    for arm in arms:
        if arm.selection is None and arm.kept != arm.pool:
            notes.append(f"{arm.arm} trains {arm.pool:,} entries at first; its count is of the {arm.kept:,} it keeps.")
    whole = [arm.arm for arm in arms if arm.selection is not None and arm.kept == arm.pool]
    if whole:
        notes.append(
            f"{', '.join(whole)}: the budget is the whole pool, so nothing is masked. Lower "
            "fish_tuning.prune_to_ratio_of_baseline, or enlarge the pool with lora.fish_rank or peft.fish_args."
        )
    return notes
