"""The serial adapter: a bottleneck behind the attention's and the feed-forward's output projection of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fish_tuning.adapters.bottleneck import NON_LINEARITIES, features, small_linear
from fish_tuning.adapters.families import find_family
from fish_tuning.adapters.tuner import AdapterConfig, AdapterLayer, AdapterTuner, AdapterType, register


@dataclass
class SerialAdapterConfig(AdapterConfig):
    """Configuration of a serial adapter: h + up(act(down(h))) on the output h of each target.

    The targets are the output projections of the attention and of the feed-forward network, so the adapter comes before
    the dropout, the residual connection and the normalisation that follow them. It starts near the identity, but not
    at it: with an `up` of exact zeros the gradient of `down`, and with it half of all Fisher scores, would be zero.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751.

    Args:
        bottleneck_size: features between `down` and `up`. A target with d outputs gets
            2 * d * bottleneck_size + d + bottleneck_size parameters.
        non_linearity: "gelu", "relu", "silu" or "tanh".
        dropout: on the input of `down`, in training.
        init_std: standard deviation of the starting weights of `down` and `up`, cut at twice that; biases are zero.
        target_modules: ends of the names of the linear layers to adapt, or a regular expression for whole names.
            None: the output projections, which are known for BERT, RoBERTa, ModernBERT, DistilBERT, Llama, Qwen2,
            Phi-3, GPT-2, ViT and all that name theirs alike.
        exclude_modules: likewise, layers to leave alone.
        layers_to_transform: numbers of the layers to adapt, from 0; None for all.
        modules_to_save: modules beside the adapter that are trained and saved whole, such as a classifier.

    Raises:
        AdapterError: (a ValueError) for a value out of range, and from `get_peft_model`, before it changes anything,
            for a model without such layers.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from fish_tuning.adapters import SerialAdapterConfig
        >>> size = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=40, **size))
        >>> model = get_peft_model(model, SerialAdapterConfig(bottleneck_size=4, task_type="SEQ_CLS"))
        >>> model(torch.tensor([[2, 5, 7, 3]])).logits.shape
        torch.Size([1, 2])
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = AdapterType.SERIAL_ADAPTER


class SerialAdapterLayer(AdapterLayer):
    """A linear layer, then the bottlenecks of the active adapters one after another: (..., d) -> (..., d)."""

    adapter_type = AdapterType.SERIAL_ADAPTER
    adapter_layer_names = ("serial_adapter_down", "serial_adapter_up")
    other_param_names = ("serial_adapter_dropout", "serial_adapter_act")

    serial_adapter_down: nn.ModuleDict
    serial_adapter_up: nn.ModuleDict
    serial_adapter_dropout: nn.ModuleDict
    serial_adapter_act: nn.ModuleDict

    def make_adapter(self, adapter_name: str, config: SerialAdapterConfig, key: str) -> None:
        width = features(self.get_base_layer())[1]
        self.serial_adapter_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.serial_adapter_down[adapter_name] = small_linear(width, config.bottleneck_size, config.init_std)
        self.serial_adapter_act[adapter_name] = NON_LINEARITIES[config.non_linearity]()
        self.serial_adapter_up[adapter_name] = small_linear(config.bottleneck_size, width, config.init_std)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        h: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return h
        for name in self.active_adapters:
            if name in self.serial_adapter_down:
                h = h + self._bottleneck(name, h).to(h.dtype)
        return h

    def _bottleneck(self, name: str, h: Tensor) -> Tensor:
        down = self.serial_adapter_down[name]
        h = self._cast_input_dtype(h, down.weight.dtype)  # type: ignore[arg-type]
        hidden = down(self.serial_adapter_dropout[name](h))
        up: Tensor = self.serial_adapter_up[name](self.serial_adapter_act[name](hidden))
        return up


class SerialAdapterModel(AdapterTuner):
    """PEFT's tuner for `SerialAdapterConfig`; `get_peft_model` makes it."""

    adapter_type = AdapterType.SERIAL_ADAPTER
    prefix = "serial_adapter_"
    tuner_layer_cls = SerialAdapterLayer

    def fill_names(self, config: SerialAdapterConfig) -> None:
        if config.target_modules is None:
            family = find_family(self.model, "target_modules")
            config.target_modules = [family.attention_output, family.feedforward_output]

    def new_layer(self, target: nn.Module, config: SerialAdapterConfig, key: str) -> SerialAdapterLayer:
        return SerialAdapterLayer(target)


register(AdapterType.SERIAL_ADAPTER, SerialAdapterConfig, SerialAdapterModel)
