"""transformers' TrainingArguments of an experiment, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from fish_tuning.errors import ConfigurationError, did_you_mean
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.run.launch import this_launch


def training_arguments(
    config: ExperimentConfig, seed: int, folder: Path, extra: Mapping[str, Any] | None = None
) -> TrainingArguments:
    """The TrainingArguments of one seed. Raises ConfigurationError for values that transformers refuses."""
    chosen = {
        "dataloader_pin_memory": torch.cuda.is_available(),
        "log_level_replica": "error",  # where several processes train together, the first tells
        # Without it, processes that were launched on CPUs would train alone, each the whole.
        **({"use_cpu": True} if this_launch().number > 1 and not torch.accelerator.is_available() else {}),
        **config.training.args_override,
        **config.dataset.training_args,
        **(extra or {}),
    }
    try:
        arguments = TrainingArguments(output_dir=str(folder), seed=seed, disable_tqdm=True, **chosen)
    except Exception as error:  # transformers raises whatever a value of the wrong kind leads to
        raise ConfigurationError(f"training.args_override: {error}") from error
    _check_numbers(arguments)
    _check_reports(arguments)
    return arguments


def as_one_model(arguments: TrainingArguments) -> TrainingArguments:
    """The same arguments for a model that lies where it was loaded: no copy of it on each GPU shares the batches."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def early_stopping_arguments(metric: str) -> dict[str, Any]:
    """What transformers' EarlyStoppingCallback needs: an evaluation and a checkpoint an epoch, the best one back."""
    return {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "greater_is_better": True,
    }


def _check_numbers(arguments: TrainingArguments) -> None:
    """TrainingArguments takes these as they come, and training fails on them, does nothing, or does something else."""
    if arguments.auto_find_batch_size:
        raise ConfigurationError(
            "training.args_override.auto_find_batch_size=True: an arm that runs out of memory would be trained with "
            "smaller batches than the others. Lower per_device_train_batch_size, and raise gradient_accumulation_steps."
        )
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(arguments, name) < 1:
            raise ConfigurationError(
                f"training.args_override.{name}={getattr(arguments, name)}: must be a whole number from 1."
            )
    if not arguments.learning_rate > 0:
        raise ConfigurationError(
            f"training.args_override.learning_rate={arguments.learning_rate}: must be a number above 0."
        )
    if arguments.max_steps <= 0 and not arguments.num_train_epochs > 0:
        raise ConfigurationError(
            f"training.args_override.num_train_epochs={arguments.num_train_epochs}: must be a number above 0, "
            "or set max_steps to a whole number from 1."
        )


def _check_reports(arguments: TrainingArguments) -> None:
    """Refuse a report that the Trainer would refuse: an unknown one, or one whose package is not installed."""
    available = get_available_reporting_integrations()
    for name in arguments.report_to or []:
        if name == "flyte" or name in available:  # transformers does not count flyte among those it finds
            continue
        reason = (
            "its package is not installed" if name in INTEGRATION_TO_CALLBACK else "transformers has no such report"
        )
        raise ConfigurationError(
            f"training.args_override.report_to={name!r}: {reason}.{did_you_mean(str(name), INTEGRATION_TO_CALLBACK)} "
            f"Installed are {', '.join(available) or 'none'}. Install what it needs, or write 'none'."
        )
