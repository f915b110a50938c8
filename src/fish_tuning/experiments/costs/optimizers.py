"""Bytes that optimizers keep between steps, by the names that `TrainingArguments.optim` gives them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch

STEP_BYTES = 4  # AdamW's count of its steps: one fp32 number a tensor
_BLOCK, _SMALLEST = 256, 4096  # bitsandbytes: entries that share a scale, and of the smallest tensor kept in 8 bits
_FACTORED = ("adafactor", "adalomo", "galore_adafactor", "galore_adafactor_layerwise")
# Numbers an entry in the dtype of the values; names that are not here are taken for AdamW's two.
_NUMBERS = {
    "sgd": 0, "schedule_free_sgd": 1, "lomo": 0, "adagrad": 1,
    "rmsprop": 1, "rmsprop_bnb": 1, "rmsprop_bnb_32bit": 1,
    "lion_32bit": 1, "paged_lion_32bit": 1,
    "ademamix": 3, "paged_ademamix_32bit": 3,
}  # fmt: skip
_IN_8_BITS = {
    "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "adamw_torch_8bit": 2,
    "ademamix_8bit": 3, "paged_ademamix_8bit": 3,
    "lion_8bit": 1, "paged_lion_8bit": 1, "rmsprop_bnb_8bit": 1,
}  # fmt: skip
_ADAMW = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused",
    "paged_adamw_32bit", "schedule_free_adamw", "schedule_free_radam", "grokadamw", "stable_adamw",
)  # fmt: skip
_WITHOUT_STEPS = re.compile(r"sgd|lomo|paged|bnb|8bit|lion_32bit|ademamix")


class Trained(NamedTuple):
    """A tensor that an optimizer holds."""

    entries: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.entries * self.dtype.itemsize


class OptimizerState(NamedTuple):
    """What an optimizer keeps: its bytes, in how many tensors, and what was assumed where it is no torch AdamW."""

    nbytes: int
    tensors: int
    assumed: str | None


def optimizer_state(optim: str, trained: Iterable[Trained]) -> OptimizerState:
    """What the optimizer of that name keeps of these tensors once it has stepped.

    Exact for torch's AdamW, fused or not: two numbers an entry, in the dtype of the values, and one a tensor. Of others
    it is what their papers and sources say; `assumed` tells it.

    Example:
        >>> import torch
        >>> from fish_tuning.experiments.costs.optimizers import Trained, optimizer_state
        >>> optimizer_state("adamw_torch_fused", [Trained(1000, torch.float32)])
        OptimizerState(nbytes=8004, tensors=3, assumed=None)
    """
    held = [tensor for tensor in trained if tensor.entries]
    numbers = _NUMBERS.get(optim, 2)
    steps = 0 if _WITHOUT_STEPS.search(optim) else len(held)
    if optim in _IN_8_BITS:
        numbers = _IN_8_BITS[optim]
        nbytes = sum(numbers * _in_8_bits(tensor.entries) for tensor in held)
        return OptimizerState(nbytes, 2 * numbers * len(held), _told(optim, numbers, "of 8 bits (32 in small tensors)"))
    if optim in _FACTORED:
        # Selected entries lie in a column, of which one factor is as long as they are many.
        nbytes = sum(4 * (tensor.entries + 1) for tensor in held)
        return OptimizerState(nbytes, 2 * len(held), _told(optim, 1, "at most"))
    nbytes = sum(numbers * tensor.nbytes for tensor in held) + steps * STEP_BYTES
    exact = optim in ("adamw_torch", "adamw_torch_fused")
    known = exact or optim in _ADAMW or optim in _NUMBERS
    note = None if exact else _told(optim, numbers, "in the dtype of the values" if known else "as AdamW keeps")
    return OptimizerState(nbytes, numbers * len(held) + steps, note)


def _in_8_bits(entries: int) -> int:
    return 4 * entries if entries < _SMALLEST else entries + 4 * math.ceil(entries / _BLOCK)


def _told(optim: str, numbers: int, how: str) -> str:
    what = f"{numbers or 'no'} number{'' if numbers == 1 else 's'} an entry"
    return f"optim={optim}: {what}{f' {how}' if numbers else ''} is assumed."


def step_bytes(optim: str, trained: Iterable[Trained], gpu: bool) -> int:
    """What a step needs beside state and gradients: torch's AdamW that is not fused makes new tensors of its own.

    On a GPU it does so for all tensors at once, on a CPU one by one.
    """
    sizes = [tensor.nbytes for tensor in trained]
    if "fused" in optim or not sizes:
        return 0
    return sum(sizes) if gpu else max(sizes)
