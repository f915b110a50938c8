"""What a run depends on, as one short key: a finished run is not repeated while it stays the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fish_tuning.experiments.config.arm_names import ArmName
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.records.run_record import ArmPlan
from fish_tuning.peft_methods import peft_method


def config_hash(
    config: ExperimentConfig, arm: ArmPlan, seed: int, fixed: Mapping[str, Any], learning_rate: float | None
) -> str:
    """The key of one arm with one seed. `fixed` is what the whole experiment shares: data and package versions."""
    parts = config.model_dump(mode="json", include={"model", "dataset", "training"})
    del parts["training"]["output_dir"], parts["training"]["learning_rates"]
    parts["training"]["args_override"] |= config.method_of(arm.arm).training_args
    if learning_rate is not None:
        parts["training"]["args_override"]["learning_rate"] = learning_rate
    parts |= {"arm": arm.arm, "seed": seed, "settings": arm.settings, "trainable_parameters": arm.trainable_parameters}
    parts |= fixed
    if peft_method(arm.method).takes_init_lora_weights:
        parts["init_lora_weights"] = config.lora.init_lora_weights  # which settings, made without weights, lack
    selection = ArmName.parse(arm.arm).selection
    if selection is not None:
        parts["names_to_exclude"] = config.lora.names_to_exclude
        parts |= {"quotas": config.fish_tuning.quotas} if selection.quotas else {}
        if selection.method != "rand":  # which needs no scores
            parts |= {"num_samples": config.fish_tuning.num_samples, "warmup_steps": config.warmup_steps(arm.method)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
