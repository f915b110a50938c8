"""transformers' TrainingArguments of an experiment, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_utils import SaveStrategy, SchedulerType

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
    _check_workers(arguments)
    _check_measuring(arguments)
    _check_reports(arguments)
    _check_schedule(arguments)
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


def check_best(arguments: TrainingArguments, metrics: Collection[str]) -> None:
    """Refuse a best checkpoint by a metric that evaluations do not bring: training would fail at the first of them."""
    asked = arguments.metric_for_best_model
    wanted = (
        arguments.load_best_model_at_end
        or arguments.save_strategy == SaveStrategy.BEST
        or arguments.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
    )
    allowed = ("loss", *metrics)
    if wanted and asked is not None and asked.removeprefix("eval_") not in allowed:
        raise ConfigurationError(
            f"training.args_override.metric_for_best_model={asked!r}: evaluations bring {', '.join(allowed)}."
            f"{did_you_mean(asked, allowed)}"
        )


def _check_workers(arguments: TrainingArguments) -> None:
    """What torch's data loaders refuse once every arm has been prepared."""
    workers = arguments.dataloader_num_workers
    if type(workers) is not int or workers < 0:
        raise ConfigurationError(
            f"training.args_override.dataloader_num_workers={workers}: must be a whole number from 0."
        )
    if arguments.dataloader_persistent_workers and not workers:
        raise ConfigurationError(
            "training.args_override.dataloader_persistent_workers=true needs dataloader_num_workers from 1; set it, or "
            "leave out the first."
        )
    known = TrainingArguments.__dataclass_fields__.get("train_sampling_strategy")
    allowed = known.metadata.get("choices", ()) if known is not None else ()
    asked = getattr(arguments, "train_sampling_strategy", None)
    if allowed and asked not in allowed:
        raise ConfigurationError(
            f"training.args_override.train_sampling_strategy={asked!r}: must be one of {', '.join(allowed)}."
            f"{did_you_mean(str(asked), allowed)}"
        )


def _check_measuring(arguments: TrainingArguments) -> None:
    """What leaves evaluations without the metrics that arms are compared by."""
    unusual = {"prediction_loss_only": True, "batch_eval_metrics": True, "eval_do_concat_batches": False}
    for name, value in unusual.items():
        if bool(getattr(arguments, name)) is value:
            raise ConfigurationError(
                f"training.args_override.{name}={str(value).lower()}: evaluations would bring no metric to compare "
                "arms by. Leave it out."
            )
    if arguments.label_names not in (None, ["labels"]):
        raise ConfigurationError(
            f"training.args_override.label_names={arguments.label_names}: batches have their labels under the name "
            "labels, whatever the column is called. Leave it out, and name the column in dataset.label_column."
        )


def _check_schedule(arguments: TrainingArguments) -> None:
    """What transformers refuses of a schedule of learning rates once every arm has been prepared."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=arguments.learning_rate)
    options: Any = arguments.lr_scheduler_kwargs or {}
    try:
        get_scheduler(arguments.lr_scheduler_type, optimizer, 1, 10, options)
    except Exception as error:  # whatever a wrong option leads to
        raise ConfigurationError(
            f"training.args_override.lr_scheduler_type={_word(arguments.lr_scheduler_type)} with "
            f"lr_scheduler_kwargs={options}: {error}. Set lr_scheduler_kwargs, or take another schedule."
        ) from error


def optimizer_missing(arguments: TrainingArguments) -> str | None:
    """What is to be installed for the optimizer, if anything; a plan can do without it."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError) as error:  # also of those that want a model, which is no fault
        if "install" in str(error).lower():
            return f"training.args_override.optim={_word(arguments.optim)} cannot run here: {error}"
    return None


def _word(choice: Any) -> str:
    """One of transformers' enumerations, as a file has it."""
    return str(getattr(choice, "value", choice))


def check_optimizer(arguments: TrainingArguments) -> None:
    """Refuse an optimizer whose package is not installed: every arm would fail on it."""
    if missing := optimizer_missing(arguments):
        raise ConfigurationError(f"{missing}. Or take another optim.")


def _check_reports(arguments: TrainingArguments) -> None:
    """Refuse a report that the Trainer would refuse: an unknown one, or one whose package is not installed."""
    available = get_available_reporting_integrations()
    for name in arguments.report_to or []:
        if name == "flyte" or name in available:  # transformers does not count flyte among those it finds
            continue
        known = name in INTEGRATION_TO_CALLBACK
        reason = "its package is not installed" if known else "transformers has no such report"
        hint = "" if known else did_you_mean(str(name), INTEGRATION_TO_CALLBACK)
        raise ConfigurationError(
            f"training.args_override.report_to={name!r}: {reason}.{hint} "
            f"Installed are {', '.join(available) or 'none'}. Install what it needs, or write 'none'."
        )
