"""UniPELT: LoRA, a serial adapter and a prefix in every layer, each behind a gate of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fish_tuning.adapters.errors import AdapterError
from fish_tuning.adapters.families import Names, base_modules, find_family, is_targeted, matching
from fish_tuning.adapters.prefix import check_attention, key_value_width, use_prefix_attention
from fish_tuning.adapters.tuner import AdapterConfig, AdapterTuner, AdapterType, is_number, register
from fish_tuning.adapters.unipelt_layers import UniPELTFeedForward, UniPELTLayer, UniPELTProjection


@dataclass
class UniPELTConfig(AdapterConfig):
    """Configuration of UniPELT: three small modules in every layer, each scaled by a gate sigmoid(w x + b).

    - LoRA on the query and value projections (or the fused one): W x + gate(x) * lora_alpha / r * B A x;
    - an adapter on the output h of the feed-forward network: h + gate(h) * up(act(down(h)));
    - `num_virtual_tokens` trainable keys and values before those of the attention. The logarithm of the gate is added
      to their logits: 1 is plain prefix tuning, 0 is attention without prefix.

    Each token has gates of its own, from its own input. The original takes the mean over the sequence; then an
    example's output would depend on how far its batch is padded, and in a causal model on tokens that are still to
    come. While the adapter is on the model, its attention runs as transformers' SDPA ("fish_prefix");
    `unload()` restores what was set before.

    Source: Mao et al., "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning", arXiv 2110.07577.

    Args:
        r: rank of LoRA; `lora_alpha / r` scales it.
        lora_alpha: see `r`.
        bottleneck_size: features between the adapter's `down` and `up`.
        non_linearity: of the adapter: "gelu", "relu", "silu" or "tanh".
        num_virtual_tokens: length of the prefix in each layer. 10 as in the original; the FISH-Tuning paper's
            prefixes have 30.
        gate_bias: where the gates start: their weights are zero, so a gate is sigmoid(gate_bias). 0 opens them by half,
            -5 starts close to the model without adapter.
        dropout: on the input of LoRA and of the adapter, in training.
        init_std: standard deviation of the starting weights of B, down, up and the prefix. No tensor starts at zero but
            gates and biases, because a factor of zeros takes the gradient, and the Fisher score, from its partner.
        target_modules: ends of the names of LoRA's layers, or a regular expression for whole names. None: known by name
            for BERT, RoBERTa, ModernBERT, DistilBERT, Llama, Qwen2, Phi-3, GPT-2, ViT and all that name theirs alike.
        feedforward_modules: likewise, the adapter's.
        prefix_modules: likewise, the projection in each attention layer that makes the queries; it holds the prefix.
        exclude_modules: likewise, layers to leave alone.
        layers_to_transform: numbers of the layers to adapt, from 0; None for all.
        modules_to_save: modules beside the adapter that are trained and saved whole, such as a classifier.

    Raises:
        AdapterError: (a ValueError) for a value out of range, and from `get_peft_model`, before it changes anything,
            for a model without such layers or whose attention does not go through transformers' AttentionInterface.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from fish_tuning.adapters import UniPELTConfig
        >>> size = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=40, **size))
        >>> model = get_peft_model(model, UniPELTConfig(r=2, num_virtual_tokens=5, task_type="SEQ_CLS"))
        >>> model(torch.tensor([[2, 5, 7, 3]])).logits.shape
        torch.Size([1, 2])
    """

    r: int = 8
    lora_alpha: float = 16
    num_virtual_tokens: int = 10
    gate_bias: float = 0.0
    feedforward_modules: list[str] | str | None = None
    prefix_modules: list[str] | str | None = None

    list_fields: ClassVar[tuple[str, ...]] = (*AdapterConfig.list_fields, "feedforward_modules", "prefix_modules")
    name_fields: ClassVar[tuple[str, ...]] = ("target_modules", "feedforward_modules", "prefix_modules")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = AdapterType.UNIPELT
        self.require_count("r")
        self.require("lora_alpha", is_number(self.lora_alpha) and self.lora_alpha > 0, "a number above 0")
        self.require_count("num_virtual_tokens")
        self.require("gate_bias", is_number(self.gate_bias), "a number")
        for name in self.name_fields:
            self.require(name, getattr(self, name) != "all-linear", "the names of its own layers")

    def names(self, field: str) -> Names:
        """One of the `name_fields`, which `get_peft_model` has filled in."""
        names: Names = getattr(self, field)
        return names


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
