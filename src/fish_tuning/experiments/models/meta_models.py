"""The models of an experiment without their weights, to be counted."""

from __future__ import annotations

from typing import Any

from fish_tuning.experiments.config.arm_names import Variant
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.data.tasks import Task
from fish_tuning.experiments.models.base_weights import settings_of
from fish_tuning.experiments.models.building import build_meta_model


class MetaModels:
    """Models without weights, one for each adapter that the arms train or choose from."""

    def __init__(self, config: ExperimentConfig, model_config: Any, task: Task) -> None:
        self.config, self.model_config, self.task = config, model_config, task
        self.made: dict[tuple[str, Variant], Any] = {}

    def __call__(self, arm: str) -> Any:
        section, variant = self.config.method_of(arm), self.config.variant_of(arm)
        if (section.name, variant) not in self.made:
            model = build_meta_model(self.config, self.model_config, self.task, section, variant)
            self.made[section.name, variant] = model
        return self.made[section.name, variant]

    def settings(self, arm: str) -> Any:
        return settings_of(self(arm))
