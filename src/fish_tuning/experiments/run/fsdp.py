"""FSDP, where accelerate or the training arguments ask for it: what is refused before anything is computed."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import TrainingArguments

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.experiment import ExperimentConfig

_EMPTY_WEIGHTS = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # transformers then loads weights in the first process alone


def is_on(variable: str) -> bool:
    """Whether `accelerate launch` has set this environment variable to yes."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def fsdp_version(arguments: TrainingArguments) -> int | None:
    """The version of FSDP that the arguments or `accelerate launch` ask for; None where neither does."""
    if arguments.fsdp:
        return int(_settings(arguments).get("version", 2))
    return int(os.environ.get("FSDP_VERSION", "1")) if is_on("ACCELERATE_USE_FSDP") else None


def sharded_by(arguments: TrainingArguments) -> str:
    """For a card, what has spread the model over the processes; nothing where each has the whole."""
    if fsdp_version(arguments) is not None:
        return ", sharded by FSDP2"
    return ", with DeepSpeed" if arguments.deepspeed or is_on("ACCELERATE_USE_DEEPSPEED") else ""


def check_fsdp(arguments: TrainingArguments, config: ExperimentConfig) -> None:
    """Refuse what FSDP would not do, or what could not be saved after it; nothing where FSDP is not asked for.

    Raises ConfigurationError.
    """
    version = fsdp_version(arguments)
    if version is None:
        return
    if version == 1:
        raise ConfigurationError(
            f"{_asked(arguments)}: version 1 of FSDP changes the names that PEFT finds an adapter's tensors by, so no "
            "adapter could be saved. Use version 2 (fsdp_version: 2 in accelerate's configuration, version: 2 in "
            "training.args_override.fsdp_config)."
        )
    if not shards_on(arguments.device):
        raise ConfigurationError(
            f"{_asked(arguments)}: accelerate shards on accelerators alone, and would give each process on a "
            f"{arguments.device.type} the whole model without a word (DDP). Leave FSDP out here: DDP trains the same."
        )
    if arguments.fsdp and str(_settings(arguments).get("cpu_ram_efficient_loading", False)).lower() == "true":
        raise ConfigurationError(
            "training.args_override.fsdp_config.cpu_ram_efficient_loading=true: all processes but the first would "
            "start without weights, and models are scored before they are sharded. Leave it out."
        )
    sections = [config.method_of(arm) for arm in config.arms]
    if any(config.choice_of(section).reselect_every for section in sections):
        raise ConfigurationError(
            "fish_tuning.reselect_every under FSDP: it goes on with the entries that it was given. Leave it out, or "
            "train with DDP."
        )


def load_whole_weights() -> None:
    """Have every process load the model: accelerate's default under FSDP leaves all but the first without weights."""
    if is_on("ACCELERATE_USE_FSDP"):
        os.environ[_EMPTY_WEIGHTS] = "false"


def shards_on(device: torch.device) -> bool:
    """Whether accelerate shards a model on such a device."""
    return device.type != "cpu"


def _asked(arguments: TrainingArguments) -> str:
    own = "training.args_override.fsdp" if arguments.fsdp else "FSDP in accelerate's configuration"
    return f"{own} (version {fsdp_version(arguments)})"


def _settings(arguments: TrainingArguments) -> dict[str, Any]:
    return arguments.fsdp_config if isinstance(arguments.fsdp_config, dict) else {}
