"""DeepSpeed, where accelerate or the training arguments ask for it: what is refused before anything is computed."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.experiment import ExperimentConfig


def check_deepspeed(arguments: TrainingArguments, config: ExperimentConfig) -> None:
    """Refuse what DeepSpeed would not do, or what could not be saved after it; nothing where it is not asked for.

    Raises ConfigurationError.
    """
    plugin: Any = getattr(arguments, "deepspeed_plugin", None)
    if plugin is None:
        return
    sections = [config.method_of(arm) for arm in config.arms]
    if any(config.choice_of(section).reselect_every for section in sections):
        raise ConfigurationError(
            "fish_tuning.reselect_every under DeepSpeed: it goes on with the entries that it was given. Leave it out, "
            "or train with DDP."
        )
    zero = plugin.deepspeed_config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ConfigurationError(
            "DeepSpeed ZeRO-3 without stage3_gather_16bit_weights_on_model_save (accelerate calls it "
            "zero3_save_16bit_model): no process would have an adapter to save. Set it to true."
        )
