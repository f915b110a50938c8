"""The models that arms start from. What a start computes from the weights (PiSSA's SVDs) is computed once a seed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import set_seed

from fish_tuning.experiments.config.arm_names import Variant
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.sections import STARTS_AT_ZERO, PeftMethodConfig
from fish_tuning.experiments.models.building import build_base_model, build_model, peft_config_of, put_adapter
from fish_tuning.experiments.run.plan import Plan
from fish_tuning.peft_methods import peft_method


class Starts:
    """`starts(arm, seed)` is the model that an arm starts from, a new one each time: the same bits for the same seed.

    Of starts that are computed from weights, the tensors that the adapter brings or changes stay on the CPU for the
    other arms of the seed.
    """

    def __init__(self, config: ExperimentConfig, plan: Plan) -> None:
        self._config, self._plan = config, plan
        self._seed: int | None = None
        self._kept: dict[tuple[str, Variant], dict[str, Tensor]] = {}

    def __call__(self, arm: str, seed: int) -> Any:
        section, variant = self._config.method_of(arm), self._config.variant_of(arm)
        model_config, task = self._plan.model_config, self._plan.task
        if not self._is_computed_from_weights(section):
            return build_model(self._config, model_config, task, section, variant, seed=seed)
        if seed != self._seed:
            self._seed, self._kept = seed, {}
        base = build_base_model(self._config, model_config, task, seed=seed)
        adapter = peft_config_of(self._config, section, base, variant)
        if (section.name, variant) in self._kept:
            return _restored(base, adapter, section, self._kept[section.name, variant])
        set_seed(seed)  # as build_model does
        model = put_adapter(base, adapter, section)
        self._kept[section.name, variant] = _brought(model)
        return model

    def _is_computed_from_weights(self, section: PeftMethodConfig) -> bool:
        init = self._config.init_lora_weights(section)
        return peft_method(section.method).takes_init_lora_weights and init not in (*STARTS_AT_ZERO, False)


def _restored(base: Any, adapter: Any, section: PeftMethodConfig, kept: dict[str, Tensor]) -> Any:
    """The model with the tensors of an earlier one; PEFT's cheapest start stands in for the one that was computed."""
    init = adapter.init_lora_weights
    adapter.init_lora_weights = True
    model = put_adapter(base, adapter, section)
    adapter.init_lora_weights = init  # what the saved adapter tells
    for name, tensor in kept.items():
        model.get_parameter(name).data = tensor.clone()  # with its strides, which arithmetic may depend on
    return model


def _brought(model: nn.Module) -> dict[str, Tensor]:
    """What a start may have set: all that is trained, and the weights of the layers it was put around."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or ".base_layer." in name
    }
