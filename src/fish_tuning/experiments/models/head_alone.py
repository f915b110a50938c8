"""The arm that trains a task's new head alone: an ordinary PEFT adapter that changes nothing and stays frozen."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.models.targets import head_names


def head_alone_config(base: Any) -> PeftConfig:
    """The smallest LoRA that PEFT carries beside a head: rank 1 on one layer, where B = 0 adds exactly zero."""
    head = head_names(base)
    layer = next(
        (
            name
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and name.partition(".")[0] not in head
        ),
        None,
    )
    if layer is None:
        raise ConfigurationError(
            f"The arm head needs a linear layer in {type(base).__name__} that PEFT can hold on to; there is none. "
            "Leave it out of fish_tuning.methods_to_run."
        )
    return LoraConfig(r=1, lora_alpha=2, target_modules=[layer], modules_to_save=head)


def freeze_all_but_head(model: nn.Module) -> None:
    """Freeze the adapter; PEFT keeps the trained head under `modules_to_save`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".modules_to_save." in name)
