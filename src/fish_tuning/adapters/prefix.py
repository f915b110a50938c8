"""Trainable prefix keys and values, put before the keys and values of transformers' own attention.

transformers looks up the attention function by name. The function that is registered here is its scaled dot-product
attention, which it calls as it is where a layer has no prefix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fish_tuning.adapters.errors import AdapterError
from fish_tuning.scores.layer_rules import register_rule

ATTENTION = "fish_prefix"


class PrefixTokens(nn.Module):
    """The prefix of one attention layer, keys or values, for every example: (n, ...) -> (n, tokens, width)."""

    def __init__(self, tokens: int, width: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, width))
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.expand(x.shape[0], -1, -1)


def _nothing(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], 1)


@register_rule(PrefixTokens, keep=_nothing)
def _prefix_tokens(module: nn.Module, nothing: Tensor, g: Tensor) -> dict[str, Tensor]:
    """The output is the weight once an example, so its gradient is the example's; a layer's calls are added up."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return {"weight": g.unflatten(1, (-1, len(weight))).sum(1)}


class Prefix(NamedTuple):
    """A prefix for one call of an attention layer: (n, P, width) keys and values, (n, T, 1) logarithms of its gate."""

    key: Tensor
    value: Tensor
    log_gate: Tensor


class PrefixSource:
    """Mixin of the projection whose call comes before its attention layer's and leaves the prefixes for it."""

    prefixes: list[Prefix] | None = None

    def has_prefix(self) -> bool:
        raise NotImplementedError

    def take_prefixes(self) -> list[Prefix]:
        """What was left by the last call, once."""
        prefixes, self.prefixes = self.prefixes, None
        if not self.has_prefix():
            return []
        if prefixes is None:
            raise AdapterError(
                "An attention layer asked for its prefix before the projection that holds it was called. "
                "prefix_modules must name the projection that makes the queries."
            )
        return prefixes


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention over a gated prefix and the given keys.

    The logarithm of query t's gate is added to t's logits of the prefix. With gate 1 that is plain prefix tuning; with
    gate 0 the prefix has no weight and the attention is the model's own. Every query sees the whole prefix, whatever
    the mask, the window or the cache leaves of the other keys.

    Args:
        module: the attention layer; a child that is a `PrefixSource` holds the prefix.
        query: (n, heads, T, head size).
        key: (n, key heads, S, head size), and `value` likewise; S is more than T when some come from a cache.
        attention_mask: None, or bool (true where attended) or float (added to logits), (n or 1, heads or 1, T, S).

    Returns:
        (n, T, heads, head size), and None for the attention's weights, as transformers wants it.
    """
    prefixes = [
        prefix for child in module.children() if isinstance(child, PrefixSource) for prefix in child.take_prefixes()
    ]
    if not prefixes:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    _refuse_extras(module, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    bias = _additive_mask(query, key, attention_mask, causal)
    n, _, length, _ = query.shape
    for prefix in prefixes:
        gate = prefix.log_gate.to(bias.dtype).transpose(1, 2)[..., None]  # (n, 1, T, 1)
        columns = gate.expand(n, bias.shape[1], length, prefix.key.shape[1])
        bias = torch.cat([columns, bias.expand(n, -1, length, -1)], dim=-1)
        key = torch.cat([_by_head(prefix.key, key), key], dim=2)
        value = torch.cat([_by_head(prefix.value, value), value], dim=2)
    groups = query.shape[1] // key.shape[1]
    output = F.scaled_dot_product_attention(
        query, repeat_kv(key, groups), repeat_kv(value, groups), bias, dropout_p=dropout, scale=scaling
    )
    return output.transpose(1, 2).contiguous(), None


def _additive_mask(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """What is added to the logits, (n or 1, heads or 1, T, S): the mask, or the causal one that its absence stands for.

    Without a mask, query t sees the first t + 1 keys, and a single query sees them all: how transformers reads it.
    """
    length, size = query.shape[2], key.shape[2]
    if mask is not None and mask.dtype != torch.bool:
        return mask.to(query.dtype)
    if mask is None:
        mask = query.new_ones(1, 1, length, size, dtype=torch.bool)
        mask = mask.tril() if causal and length > 1 else mask
    zeros = torch.zeros_like(mask, dtype=query.dtype)
    return zeros.masked_fill_(~mask, torch.finfo(query.dtype).min)


def _by_head(prefix: Tensor, like: Tensor) -> Tensor:
    """(n, P, width) as (n, heads, P, head size)."""
    n, heads, _, size = like.shape
    if prefix.shape[2] != heads * size:
        raise AdapterError(
            f"A prefix of width {prefix.shape[2]} does not fit an attention layer with {heads} heads of size {size}."
        )
    return prefix.view(n, -1, heads, size).transpose(1, 2).to(like.dtype)


def _refuse_extras(module: nn.Module, extras: dict[str, Any]) -> None:
    """Arguments that change the logits in ways that this attention does not know."""
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if extras.get(name) is not None:
            raise AdapterError(
                f"{type(module).__name__} uses {name!r} in its attention, which a prefix does not support."
            )


AttentionInterface.register(ATTENTION, prefix_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def check_attention(model: nn.Module) -> None:
    """Raise AdapterError for a model whose attention function cannot be chosen, or whose logits are not plain."""
    name = type(model).__name__
    if not (
        isinstance(model, PreTrainedModel)
        and model._supports_attention_backend
        and model._can_set_attn_implementation()
    ):
        raise AdapterError(
            f"{name} does not take its attention from transformers' AttentionInterface, which UniPELT's prefix needs. "
            "Use a model that does (such as BERT, Llama or ViT; newer transformers have more), or SerialAdapterConfig."
        )
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        raise AdapterError(f"{name} caps its attention's logits (attn_logit_softcapping), which UniPELT cannot do.")


def use_prefix_attention(model: PreTrainedModel) -> dict[str, str]:
    """Switch to the attention with prefixes; the answer is what `set_attn_implementation` needs to switch back."""
    parts = {part: getattr(model.config, part) for part in model.config.sub_configs}
    before = {"": model.config} | {part: config for part, config in parts.items() if config is not None}
    names = {part: config._attn_implementation for part, config in before.items()}
    model.set_attn_implementation(ATTENTION)
    return names


def check_function(config: Any) -> None:
    """Raise AdapterError when an attention layer would not call the attention with prefixes, which drops them."""
    if config._attn_implementation != ATTENTION:
        raise AdapterError(
            f"The model's attention was set to {config._attn_implementation!r}, which leaves UniPELT's prefix out. "
            f"Call set_attn_implementation({ATTENTION!r}) on the model, or disable_adapter() or unload() the adapter."
        )


def key_value_width(model: nn.Module) -> int:
    """Features of a token's keys in one attention layer: key heads * head size."""
    config: Any = model.config
    heads: int | None = getattr(config, "num_attention_heads", None)
    hidden: int | None = getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int):
        raise AdapterError(
            f"The configuration of {type(model).__name__} does not tell num_attention_heads and hidden_size, which "
            "UniPELT's prefix needs."
        )
    head_size: int = getattr(config, "head_dim", None) or hidden // heads
    return (getattr(config, "num_key_value_heads", None) or heads) * head_size
