"""UniPELT's wrapped layers: projections with gated LoRA and prefix, feed-forward outputs with a gated adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fish_tuning.adapters.bottleneck import NON_LINEARITIES, features, gate, small_linear
from fish_tuning.adapters.families import is_targeted
from fish_tuning.adapters.prefix import Prefix, PrefixSource, PrefixTokens, check_function
from fish_tuning.adapters.tuner import AdapterLayer, AdapterType
from fish_tuning.adapters.unipelt_config import UniPELTConfig


class UniPELTLayer(AdapterLayer):
    """A linear layer with one or more of UniPELT's modules."""

    adapter_type = AdapterType.UNIPELT

    def _input(self, gates: nn.ModuleDict, name: str, x: Tensor) -> Tensor:
        return self._cast_input_dtype(x, gates[name].weight.dtype)  # type: ignore[arg-type]


class UniPELTProjection(UniPELTLayer, PrefixSource):
    """A projection of the attention's input x: base(x) + gate(x) * LoRA(x), and the prefix where it is asked to."""

    adapter_layer_names = (
        "unipelt_lora_A",
        "unipelt_lora_B",
        "unipelt_lora_gate",
        "unipelt_prefix_key",
        "unipelt_prefix_value",
        "unipelt_prefix_gate",
    )
    other_param_names = ("unipelt_lora_dropout",)

    unipelt_lora_A: nn.ModuleDict
    unipelt_lora_B: nn.ModuleDict
    unipelt_lora_gate: nn.ModuleDict
    unipelt_lora_dropout: nn.ModuleDict
    unipelt_prefix_key: nn.ModuleDict
    unipelt_prefix_value: nn.ModuleDict
    unipelt_prefix_gate: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, prefix_width: int, attention_config: Any) -> None:
        super().__init__(base_layer)
        self.prefix_width = prefix_width
        self.attention_config = attention_config  # the attention layer's own: it names the function that it will call
        self.scaling: dict[str, float] = {}

    def make_adapter(self, adapter_name: str, config: UniPELTConfig, key: str) -> None:
        if is_targeted(key, config.names("target_modules"), config):
            self._make_lora(adapter_name, config)
        if is_targeted(key, config.names("prefix_modules"), config):
            self._make_prefix(adapter_name, config)

    def _make_lora(self, name: str, config: UniPELTConfig) -> None:
        inputs, outputs = features(self.get_base_layer())
        self.scaling[name] = config.lora_alpha / config.r
        self.unipelt_lora_dropout[name] = nn.Dropout(config.dropout)
        self.unipelt_lora_A[name] = nn.Linear(inputs, config.r, bias=False)
        self.unipelt_lora_B[name] = small_linear(config.r, outputs, config.init_std, bias=False)
        self.unipelt_lora_gate[name] = gate(inputs, config.gate_bias)

    def _make_prefix(self, name: str, config: UniPELTConfig) -> None:
        inputs = features(self.get_base_layer())[0]
        shape = (config.num_virtual_tokens, self.prefix_width)
        self.unipelt_prefix_key[name] = PrefixTokens(*shape, config.init_std)
        self.unipelt_prefix_value[name] = PrefixTokens(*shape, config.init_std)
        self.unipelt_prefix_gate[name] = gate(inputs, config.gate_bias)

    def has_prefix(self) -> bool:
        return not self.disable_adapters and any(name in self.unipelt_prefix_key for name in self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return output
        for name in self.active_adapters:
            if name in self.unipelt_lora_A:
                output = output + self._lora(name, x).to(output.dtype)
        if self.has_prefix():
            self.prefixes = [self._prefix(name, x) for name in self.active_adapters if name in self.unipelt_prefix_key]
        return output

    def _lora(self, name: str, x: Tensor) -> Tensor:
        x = self._input(self.unipelt_lora_gate, name, x)
        update: Tensor = self.unipelt_lora_B[name](self.unipelt_lora_A[name](self.unipelt_lora_dropout[name](x)))
        return torch.sigmoid(self.unipelt_lora_gate[name](x)) * self.scaling[name] * update

    def _prefix(self, name: str, x: Tensor) -> Prefix:
        check_function(self.attention_config)
        x = self._input(self.unipelt_prefix_gate, name, x)
        log_gate = F.logsigmoid(self.unipelt_prefix_gate[name](x))
        return Prefix(self.unipelt_prefix_key[name](x), self.unipelt_prefix_value[name](x), log_gate)


class UniPELTFeedForward(UniPELTLayer):
    """A feed-forward network's output h: h + gate(h) * up(act(down(h)))."""

    adapter_layer_names = ("unipelt_adapter_down", "unipelt_adapter_up", "unipelt_adapter_gate")
    other_param_names = ("unipelt_adapter_dropout", "unipelt_adapter_act")

    unipelt_adapter_down: nn.ModuleDict
    unipelt_adapter_up: nn.ModuleDict
    unipelt_adapter_gate: nn.ModuleDict
    unipelt_adapter_dropout: nn.ModuleDict
    unipelt_adapter_act: nn.ModuleDict

    def make_adapter(self, adapter_name: str, config: UniPELTConfig, key: str) -> None:
        width = features(self.get_base_layer())[1]
        self.unipelt_adapter_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.unipelt_adapter_down[adapter_name] = small_linear(width, config.bottleneck_size, config.init_std)
        self.unipelt_adapter_act[adapter_name] = NON_LINEARITIES[config.non_linearity]()
        self.unipelt_adapter_up[adapter_name] = small_linear(config.bottleneck_size, width, config.init_std)
        self.unipelt_adapter_gate[adapter_name] = gate(width, config.gate_bias)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        h: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return h
        for name in self.active_adapters:
            if name in self.unipelt_adapter_down:
                h = h + self._bottleneck(name, h).to(h.dtype)
        return h

    def _bottleneck(self, name: str, h: Tensor) -> Tensor:
        h = self._input(self.unipelt_adapter_gate, name, h)
        hidden = self.unipelt_adapter_down[name](self.unipelt_adapter_dropout[name](h))
        update: Tensor = self.unipelt_adapter_up[name](self.unipelt_adapter_act[name](hidden))
        return torch.sigmoid(self.unipelt_adapter_gate[name](h)) * update
