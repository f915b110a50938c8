"""transformers' TrainingArguments of an experiment, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config import ExperimentConfig


def training_arguments(
    config: ExperimentConfig, seed: int, folder: Path, extra: Mapping[str, Any] | None = None
) -> TrainingArguments:
    """The TrainingArguments of one seed. Raises ConfigurationError for values that transformers refuses."""
    chosen = {"dataloader_pin_memory": torch.cuda.is_available(), **config.training.args_override, **(extra or {})}
    try:
        return TrainingArguments(output_dir=str(folder), seed=seed, disable_tqdm=True, **chosen)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigurationError(f"training.args_override: {error}") from error
