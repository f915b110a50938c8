"""Whether there are as many training examples as calibration and batches ask for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from transformers import TrainingArguments

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.arm_names import ArmName, needs_scores
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.methods import LOOKS_AT_DATA, PeftMethodConfig
from fish_tuning.experiments.data.tasks import Task

HELD_OUT = 0.2  # of the training set, where learning rates are chosen


def check_most_samples(config: ExperimentConfig) -> None:
    """Refuse more calibration examples than the data set is cut to, before it is read."""
    most = config.dataset.max_train_samples
    for section in _scoring(config):
        key, asked = _asked(config, section)
        if most is not None and asked > most:
            raise ConfigurationError(
                f"{key}={asked} is more than dataset.max_train_samples={most}; lower the first or raise the second."
            )


def check_samples(config: ExperimentConfig, task: Task, examples: int) -> None:
    """Refuse more calibration examples than there are usable ones, held-out ones aside where rates are chosen."""
    unused = examples < len(task.train)
    length = f" Rows whose prompt fills training.max_seq_length={config.training.max_seq_length} do not count."
    for section in _scoring(config):
        key, asked = _asked(config, section)
        several = len(config.learning_rates_of(section)) > 1
        left = _without_held_out(examples) if several else examples
        if asked > left:
            where = f" that are left when {HELD_OUT:.0%} are held out to choose learning rates" if several else ""
            raise ConfigurationError(
                f"{key}={asked} is more than the {left} training examples{where}. Lower it, or give more of them."
                f"{length if unused else ''}"
            )


def check_batches(config: ExperimentConfig, of_methods: Iterable[TrainingArguments], examples: int) -> None:
    """Refuse to drop the last batch where it is the only one."""
    several = any(len(config.learning_rates_of(section)) > 1 for section in config.peft)
    left = _without_held_out(examples) if several else examples
    for arguments in of_methods:
        rows = arguments.per_device_train_batch_size * arguments.world_size
        if arguments.dataloader_drop_last and rows > left:
            raise ConfigurationError(
                f"training.args_override.dataloader_drop_last=true leaves nothing of {left} training examples in "
                f"batches of {rows}. Leave it out, or lower per_device_train_batch_size."
            )


def usable_examples(config: ExperimentConfig, task: Task, processing_class: Any) -> int:
    """How many training rows are used; rows are only looked at where a task leaves some out."""
    if type(task).usable is Task.usable:
        return len(task.train)
    encoded = task.encode(task.train, processing_class, config.training.max_seq_length)
    return len(task.usable(task.train_split, encoded))


def _without_held_out(examples: int) -> int:
    return examples - math.ceil(HELD_OUT * examples)


def _asked(config: ExperimentConfig, section: PeftMethodConfig) -> tuple[str, int]:
    """The key that says how many calibration examples a method has, and how many."""
    own = "num_samples" in section.fish_tuning.model_fields_set
    key = f"peft.{section.name}.fish_tuning.num_samples" if own else "fish_tuning.num_samples"
    return key, config.choice_of(section).num_samples


def _scoring(config: ExperimentConfig) -> list[PeftMethodConfig]:
    """The methods with arms that look at calibration examples, to be scored or to start."""
    names = {ArmName.parse(arm).method for arm in config.arms if _looks(config, arm)}
    return [section for section in config.peft if section.name in names]


def _looks(config: ExperimentConfig, arm: str) -> bool:
    return needs_scores(arm) or config.initialisation(arm) in LOOKS_AT_DATA
