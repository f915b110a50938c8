"""UniPELT's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fish_tuning.adapters.families import Names
from fish_tuning.adapters.tuner import AdapterConfig, AdapterType, is_number


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
