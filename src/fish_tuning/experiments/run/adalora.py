"""AdaLoRA as a dense arm: its schedule under a Trainer, and what it ends with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.adalora import AdaLoraLayer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.models.base_weights import settings_of

# Shares of the steps before ranks are cut and after, where the file sets neither `tinit` nor `tfinal`.
BEFORE, AFTER = 0.1, 0.3


class AdaLoraSchedule(TrainerCallback):
    """Tells AdaLoRA how many steps there are, and of each one, as PEFT asks for it (`update_and_allocate`)."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        settings = model.peft_config["default"]
        settings.total_step = state.max_steps
        if not settings.tinit and not settings.tfinal:
            settings.tinit, settings.tfinal = int(BEFORE * state.max_steps), int(AFTER * state.max_steps)
        if settings.tinit + settings.tfinal >= state.max_steps:
            raise ConfigurationError(
                f"peft.args.tinit={settings.tinit} and tfinal={settings.tfinal} leave none of the {state.max_steps} "
                "training steps for cutting ranks. Lower them, or train for longer."
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)  # of the step that has just been done, from 1


def entries_planned(model: nn.Module) -> int:
    """What AdaLoRA is to end with: `target_r` ranks a layer. Layers of several sizes make it an estimate."""
    settings: Any = settings_of(model)
    return int(settings.target_r) * sum(_rank_sizes(model).values())


def entries_left(model: nn.Module) -> int:
    """What it ended with: the entries of the ranks that were not cut."""
    pattern: Mapping[str, list[bool]] = settings_of(model).rank_pattern
    left = {name.partition(".lora_E")[0]: sum(kept) for name, kept in pattern.items()}
    return sum(size * left[name] for name, size in _rank_sizes(model).items())


def _rank_sizes(model: nn.Module) -> dict[str, int]:
    """The entries of one rank of each layer, by its name in the base model: a row of A, a column of B, one of E."""
    layers: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, AdaLoraLayer)
    ]
    return {
        name.removeprefix("base_model.model."): layer.lora_A["default"].shape[1] + layer.lora_B["default"].shape[0] + 1
        for name, layer in layers
    }
