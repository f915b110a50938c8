"""The models that arms start from. What a start computes from weights or data is computed once a seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from fish_tuning.experiments.config.arm_names import Variant
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.methods import GRADIENT, LOOKS_AT_DATA, PeftMethodConfig
from fish_tuning.experiments.data.tasks import Encoded
from fish_tuning.experiments.models.building import build_base_model, build_model, peft_config_of, put_adapter
from fish_tuning.experiments.run.calibration_examples import calibration_loader
from fish_tuning.experiments.run.eva import start_along_inputs
from fish_tuning.experiments.run.plan import Plan
from fish_tuning.starts.along_gradient import start_along_gradient

BATCH_SIZE = 8  # of the examples that a start looks at: the gradient is the same whatever it is, but for rounding


class Starts:
    """`starts(arm, seed)` is the model that an arm starts from, a new one each time: the same bits for the same seed.

    Of starts that are computed from the weights (PiSSA's SVDs) or the calibration examples (`LOOKS_AT_DATA`), the
    tensors that the adapter brings or changes stay on the CPU for the other arms of the seed. Where PEFT
    has changed and quantised base weights anew (OLoRA), it does so for every arm: they are more than their tensors.
    """

    def __init__(self, config: ExperimentConfig, plan: Plan, data: Encoded) -> None:
        self._config, self._plan, self._data = config, plan, data
        self._seed: int | None = None
        self._kept: dict[tuple[str, Variant], dict[str, Tensor]] = {}

    def with_data(self, data: Encoded) -> Starts:
        """The same starts, those that look at data by its training examples: no held-out one may reach a trial."""
        looks = any(self._config.initialisation(arm) in LOOKS_AT_DATA for arm in self._config.arms)
        return Starts(self._config, self._plan, data) if looks else self

    def __call__(self, arm: str, seed: int, device: torch.device | None = None) -> Any:
        """`device` is where a start that looks at data computes, and where quantised weights are loaded to.

        By default it is where transformers loads the model.
        """
        section, variant = self._config.method_of(arm), self._config.variant_of(arm)
        model_config, task = self._plan.model_config, self._plan.task
        init = self._config.initialisation(arm)
        if init in (None, False, True, "gaussian"):  # drawn, which costs nothing
            return build_model(self._config, model_config, task, section, variant, seed=seed, device=device)
        if seed != self._seed:
            self._seed, self._kept = seed, {}
        base = build_base_model(self._config, model_config, task, seed=seed, device=device)
        adapter = peft_config_of(self._config, section, base, variant)
        if (section.name, variant) in self._kept:
            return _restored(self._config, base, adapter, section, self._kept[section.name, variant])
        set_seed(seed)  # as build_model does
        model = put_adapter(self._config, base, adapter, section)
        if init in LOOKS_AT_DATA:
            number = self._config.choice_of(section).num_samples
            loader = calibration_loader(self._plan, self._data, number, seed, BATCH_SIZE)
            if init == GRADIENT:
                start_along_gradient(model, loader, device, progress=False)
            else:
                start_along_inputs(model, loader, device)
        if init in LOOKS_AT_DATA:
            self._kept[section.name, variant] = _brought(model, ".lora_A.")
        elif not getattr(base, "is_quantized", False):
            self._kept[section.name, variant] = _brought(model, ".lora_A.", ".base_layer.")
        return model


def _restored(
    config: ExperimentConfig, base: Any, adapter: Any, section: PeftMethodConfig, kept: dict[str, Tensor]
) -> Any:
    """The model with the tensors of an earlier one; PEFT's cheapest start stands in for the one that was computed."""
    init = adapter.init_lora_weights
    adapter.init_lora_weights = True
    model = put_adapter(config, base, adapter, section)
    adapter.init_lora_weights = init  # what the saved adapter tells
    for name, tensor in kept.items():
        model.get_parameter(name).data = tensor.clone()  # with its strides, which arithmetic may depend on
    return model


def _brought(model: nn.Module, *parts: str) -> dict[str, Tensor]:
    """What a start may have set: all that is trained, and what has one of `parts` in its name."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or any(part in name for part in parts)  # a factor A may be frozen
    }
