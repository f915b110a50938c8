"""Tiny random models of the families that the adapters are for, a batch for each, and the adapters on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny
import torch
from device import placed
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fish_tuning.adapters import SerialAdapterConfig, UniPELTConfig

SIZE = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": tiny.PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}


def roberta(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    return placed(RobertaForSequenceClassification(RobertaConfig(**(SIZE | {"num_labels": 3} | config))).eval())


def modernbert(**config: Any) -> nn.Module:
    """Its first layer attends globally, its second one to the nearest tokens only."""
    torch.manual_seed(0)
    own = {"num_labels": 3, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4, "global_attn_every_n_layers": 2}
    return placed(ModernBertForSequenceClassification(ModernBertConfig(**(SIZE | own | config))).eval())


def qwen2(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    return placed(Qwen2ForCausalLM(Qwen2Config(**(SIZE | {"num_key_value_heads": 1} | config))).eval())


def distilbert() -> nn.Module:
    torch.manual_seed(0)
    size = {"vocab_size": tiny.VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "num_labels": 3}
    return placed(DistilBertForSequenceClassification(DistilBertConfig(**size, initializer_range=0.3)).eval())


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    size = {"vocab_size": tiny.VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return placed(GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.3, bos_token_id=1, eos_token_id=2)).eval())


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tiny.Batch], str | None]] = {
    "bert": (tiny.bert, tiny.classification_batch, "SEQ_CLS"),
    "roberta": (roberta, tiny.classification_batch, "SEQ_CLS"),
    "modernbert": (modernbert, tiny.classification_batch, "SEQ_CLS"),
    "llama": (tiny.llama, tiny.causal_batch, "CAUSAL_LM"),
    "qwen2": (qwen2, tiny.causal_batch, "CAUSAL_LM"),
    "vit": (tiny.vit, tiny.image_batch, None),
    "distilbert": (distilbert, tiny.classification_batch, "SEQ_CLS"),
    "gpt2": (gpt2, tiny.causal_batch, "CAUSAL_LM"),
}

CONFIGS: dict[str, Callable[..., Any]] = {
    "serial": lambda **own: SerialAdapterConfig(**({"bottleneck_size": 3} | own)),
    "unipelt": lambda **own: UniPELTConfig(**({"r": 2, "bottleneck_size": 3, "num_virtual_tokens": 5} | own)),
}


def adapted(method: str, family: str = "bert", *, model: nn.Module | None = None, **own: Any) -> PeftModel:
    """A family's model with an adapter, far from the identity unless `init_std` is given."""
    make, _, task = FAMILIES[family]
    base = make() if model is None else model
    torch.manual_seed(1)
    if family == "vit":
        own = {"modules_to_save": ["classifier"]} | own
    return get_peft_model(base, CONFIGS[method](**({"task_type": task, "init_std": 0.3} | own))).eval()


def batch(family: str = "bert") -> tiny.Batch:
    return FAMILIES[family][1]()


def logits(model: nn.Module, inputs: tiny.Batch) -> torch.Tensor:
    with torch.no_grad():
        inputs = {key: value.to(next(model.parameters()).device) for key, value in inputs.items() if key != "labels"}
        output: torch.Tensor = model(**inputs).logits
    return output


def set_gates(model: nn.Module, bias: float) -> None:
    """Every gate at sigmoid(bias), whatever the token."""
    for name, parameter in model.named_parameters():
        if "_gate." in name:
            parameter.data.fill_(bias if name.endswith("bias") else 0)
