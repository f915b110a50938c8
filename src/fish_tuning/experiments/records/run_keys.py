"""What a run depends on, as short keys: a finished run is not repeated while its key stays the same.

A key holds contents, no paths: of the data and the weights, the model's configuration, the arm, the training arguments,
versions of packages and the kind of device. What cannot change a result is left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from fish_tuning.experiments.config.arm_names import ArmName
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.methods import LOOKS_AT_DATA
from fish_tuning.experiments.records.run_record import ArmPlan
from fish_tuning.masks.selections import SELECTIONS
from fish_tuning.scores.warmup import WARMUP_LEARNING_RATE

# Training arguments that say where things go, what is told, or how fast the same batches come.
_WITHOUT_EFFECT = re.compile(
    r"output_dir|run_name|report_to|project|disable_tqdm|trackio_.*|log(ging)?_.*|push_to_hub|hub_.*|debug|"
    r"dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor|multiprocessing_context|in_order)|"
    r"save_(only_model|on_each_node|total_limit)|skip_memory_metrics|include_num_input_tokens_seen|ddp_timeout|"
    r"do_(train|eval|predict)|use_cpu|torch_empty_cache_steps"
)
_SAVING = ("save_strategy", "save_steps")  # they count where the best checkpoint is loaded at the end
# Of configurations: paths, versions, and of which class and dtype the weights were saved, where others may be loaded.
_NOT_SETTINGS = (
    "_name_or_path", "base_model_name_or_path", "revision", "transformers_version", "peft_version", "inference_mode",
    "architectures", "dtype", "torch_dtype",
)  # fmt: skip


class RunKeys(NamedTuple):
    """`run` is of one run; `setting` is the same for all seeds, and for all learning rates chosen from one list."""

    run: str
    setting: str


def run_keys(
    config: ExperimentConfig, arm: ArmPlan, arguments: Mapping[str, Any], shared: Mapping[str, Any]
) -> RunKeys:
    """The keys of one arm with one seed.

    Args:
        config: the experiment.
        arm: of its plan.
        arguments: the run's whole TrainingArguments, seed included.
        shared: what all runs depend on: contents of data and weights, versions and the like.
    """
    parts = {**shared, **_arm_parts(config, arm, arguments), "arguments": effective_arguments(arguments)}
    seedless = {name: value for name, value in parts["arguments"].items() if name not in ("seed", "data_seed")}
    rates = config.learning_rates_of(config.method_of(arm.arm))
    if len(rates) > 1:
        seeds = config.training.trial_seeds
        how = ["by loss"] if config.training.choose_by == "loss" else []
        how += [f"{seeds} seeds"] if seeds > 1 else []
        seedless["learning_rate"] = [*rates, *how]
    return RunKeys(_digest(parts), _digest({**parts, "arguments": seedless}))


def effective_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The training arguments that can change what comes out."""
    left_out = () if arguments.get("load_best_model_at_end") else _SAVING
    return {
        name: value for name, value in arguments.items() if not _WITHOUT_EFFECT.fullmatch(name) and name not in left_out
    }


def plain_settings(settings: Any) -> Any:
    """A configuration without paths and versions, however deep."""
    if not isinstance(settings, Mapping):
        return settings
    return {str(name): plain_settings(value) for name, value in settings.items() if name not in _NOT_SETTINGS}


def _arm_parts(config: ExperimentConfig, arm: ArmPlan, arguments: Mapping[str, Any]) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "method": arm.method,
        "selection": arm.selection,
        "settings": plain_settings(arm.settings),
        "trainable_parameters": arm.trainable_parameters,
        "early_stopping_patience": config.training.early_stopping_patience,
    }
    if config.training.head_learning_rate is not None:
        parts["head_learning_rate"] = config.training.head_learning_rate
    section = config.method_of(arm.arm)
    choice = config.choice_of_arm(arm.arm)
    init = config.initialisation(arm.arm)
    if init is not None:
        parts["init_lora_weights"] = init  # which settings, made without weights, lack
    if config.freezes_A(section):
        parts["freeze_A"] = True
    if init in LOOKS_AT_DATA:
        parts["num_samples"] = choice.num_samples
    selection = ArmName.parse(arm.arm).selection
    if selection is not None:
        parts["names_to_exclude"] = config.lora.names_to_exclude
        parts |= {"quotas": choice.quotas} if selection.quotas else {}
        parts |= {"floors": choice.floors} if choice.floors and not selection.quotas else {}
        parts |= {"granularity": choice.granularity} if choice.granularity != "entry" else {}
        if SELECTIONS.find(selection.name).needs_scores:
            parts |= {"score": choice.score, "num_samples": choice.num_samples}
            parts |= {"warmup_steps": config.warmup_steps(section), "warmup_learning_rate": WARMUP_LEARNING_RATE}
            parts |= {"reselect_every": choice.reselect_every} if choice.reselect_every else {}
            # Earlier versions scored without the Trainer's autocast.
            precision = next((name for name in ("bf16", "fp16") if arguments.get(name)), None)
            parts |= {"scored_in": precision} if precision else {}
    return parts


def _digest(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
