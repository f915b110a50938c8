"""Which tensors of an adapter start at random numbers that a seed can give, and within which bound."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

PROMPT = "prompt_embeddings"  # PEFT's key of the one tensor of a prompt
_UNIT = math.sqrt(3)  # the bound of a uniform distribution of variance 1


def seeded_bound(key: str, shape: Sequence[int], config: Mapping[str, Any]) -> float | None:
    """The bound of the uniform start of the tensor `key` of an adapter with this configuration.

    None where the tensor starts at a constant, at what base weights or data say, or at what only PEFT can draw.
    """
    kind = str(config.get("peft_type"))
    if kind == "LORA" and _is(key, "lora_A"):
        return 1 / math.sqrt(math.prod(shape[1:]))  # kaiming_uniform_(a=sqrt(5))
    if kind == "LORA" and _is(key, "lora_embedding_B"):
        return _UNIT
    if kind in ("PREFIX_TUNING", "PROMPT_TUNING") and key == PROMPT:
        return _UNIT
    if kind == "UNIPELT" and _is(key, "unipelt_lora_A"):
        return 1 / math.sqrt(math.prod(shape[1:]))
    std = config.get("init_std")
    if kind in ("SERIAL_ADAPTER", "UNIPELT") and isinstance(std, float | int) and key.endswith("weight"):
        own = r"serial_adapter_(down|up)|unipelt_(lora_B|prefix_key|prefix_value|adapter_down|adapter_up)"
        return _UNIT * std if re.search(rf"\.({own})\.", key) else None
    return None


def starts_at_zero(key: str, config: Mapping[str, Any]) -> bool:
    """Whether `start_from_seed` sets this tensor to zero."""
    return str(config.get("peft_type")) == "LORA" and (_is(key, "lora_B") or _is(key, "lora_embedding_A"))


def _is(key: str, part: str) -> bool:
    return part in key.split(".") and not key.endswith(".bias")
