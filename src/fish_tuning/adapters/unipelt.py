"""UniPELT: LoRA, a serial adapter and a prefix in every layer, each behind a gate of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from fish_tuning.adapters.errors import AdapterError
from fish_tuning.adapters.families import Names, base_modules, find_family, is_targeted, matching
from fish_tuning.adapters.prefix import check_attention, key_value_width, use_prefix_attention
from fish_tuning.adapters.tuner import AdapterTuner, AdapterType, register
from fish_tuning.adapters.unipelt_config import UniPELTConfig
from fish_tuning.adapters.unipelt_layers import UniPELTFeedForward, UniPELTLayer, UniPELTProjection


class UniPELTModel(AdapterTuner):
    """PEFT's tuner for `UniPELTConfig`; `get_peft_model` makes it."""

    adapter_type = AdapterType.UNIPELT
    prefix = "unipelt_"
    tuner_layer_cls = UniPELTLayer

    _attention_before: dict[str, str] | None = None

    def name_fields(self) -> tuple[str, ...]:
        return UniPELTConfig.name_fields

    def fill_names(self, config: UniPELTConfig) -> None:
        check_attention(self.model)
        missing = [name for name in UniPELTConfig.name_fields if getattr(config, name) is None]
        if missing:
            family = find_family(self.model, " and ".join(missing), with_query=True)
            found: dict[str, Names] = {
                "target_modules": list(family.lora),
                "feedforward_modules": family.feedforward_only,
                "prefix_modules": [family.query],
            }
            for name in missing:
                setattr(config, name, found[name])

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> UniPELTConfig:
        config: UniPELTConfig = super()._prepare_adapter_config(peft_config, model_config)
        key_value_width(self.model)
        prefix = matching(self.model, config.names("prefix_modules"))
        for name in prefix:
            self._check_holder(name, prefix)
        projections = {*matching(self.model, config.names("target_modules")), *prefix}
        feedforward = set(matching(self.model, config.names("feedforward_modules")))
        for name, module in base_modules(self.model):  # what an adapter before this one made of a module counts too
            before = (isinstance(module, UniPELTProjection), isinstance(module, UniPELTFeedForward))
            if (name in projections or before[0]) and (name in feedforward or before[1]):
                raise AdapterError(
                    f"{name} is in target_modules or prefix_modules and in feedforward_modules; it can be in one kind."
                )
        return config

    def _check_holder(self, name: str, prefix: list[str]) -> None:
        """A prefix is looked for on the attention layer that calls for it: its projection must be that one's child."""
        parent = name.rpartition(".")[0]
        layer = type(self.model.get_submodule(parent)).__name__
        beside = [other for other in prefix if other.rpartition(".")[0] == parent]
        if "Attention" not in layer or len(beside) > 1:
            raise AdapterError(
                f"prefix_modules means {', '.join(beside)} in a {layer}; it must mean one projection in each attention "
                "layer, the one that makes the queries."
            )

    def new_layer(self, target: nn.Module, config: UniPELTConfig, key: str) -> UniPELTLayer:
        if is_targeted(key, config.names("feedforward_modules"), config):
            return UniPELTFeedForward(target)
        attention = self.model.get_submodule(key.rpartition(".")[0])
        config_of_attention = getattr(attention, "config", self.model.config)
        return UniPELTProjection(target, key_value_width(self.model), config_of_attention)

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, *args, **kwargs)
        if self._attention_before is None:
            self._attention_before = use_prefix_attention(self.model)

    def unload(self) -> nn.Module:
        model: nn.Module = super().unload()
        if self._attention_before is not None:
            model.set_attn_implementation(self._attention_before)  # type: ignore[operator]
            self._attention_before = None
        return model


register(AdapterType.UNIPELT, UniPELTConfig, UniPELTModel)
