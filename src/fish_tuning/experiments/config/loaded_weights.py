"""How a model's weights are loaded: in fewer bits (`model.quantization_config`), and where to (`model.device_map`)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from pydantic import Field, model_validator

from fish_tuning.errors import did_you_mean
from fish_tuning.experiments.config.section import Section

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # that accelerate fills in
_DEVICE = re.compile(r"(cpu|disk|mps|(cuda|xpu|npu|hpu)(:\d+)?)|\d+")
_BYTES = re.compile(r"\d+(\.\d+)?\s?([KMGT]i?B)", re.IGNORECASE)

BitsDtype = Literal["float32", "bfloat16", "float16"]


class QuantizationConfig(Section):
    """bitsandbytes' quantisation of the frozen weights, by the names and defaults of transformers' BitsAndBytesConfig.

    Left out are `llm_int8_has_fp16_weight` and `llm_int8_enable_fp32_cpu_offload`, which keep 16 or 32 bits.
    """

    load_in_4bit: bool = Field(default=False, description="true or false")
    load_in_8bit: bool = Field(default=False, description="true or false")
    bnb_4bit_quant_type: Literal["fp4", "nf4"] = Field(default="fp4", description="fp4 or nf4")
    bnb_4bit_compute_dtype: BitsDtype = Field(default="float32", description="float32, bfloat16 or float16")
    bnb_4bit_use_double_quant: bool = Field(default=False, description="true or false")
    bnb_4bit_quant_storage: BitsDtype | Literal["uint8"] = Field(
        default="uint8", description="uint8, float32, bfloat16 or float16"
    )
    llm_int8_threshold: float = Field(default=6.0, ge=0, description="a number from 0")
    llm_int8_skip_modules: list[str] | None = Field(
        default=None, description="a list of modules that keep their dtype, or null for transformers' choice"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> QuantizationConfig:
        if self.load_in_4bit == self.load_in_8bit:
            both = f"load_in_4bit and load_in_8bit are both {str(self.load_in_4bit).lower()}"
            raise ValueError(f"{both}; exactly one of them must be true, or leave out model.quantization_config")
        of_other = "llm_int8_threshold" if self.load_in_4bit else "bnb_4bit_"
        changed = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        wrong = [name for name in changed if name.startswith(of_other)]
        if wrong:
            kind, other = ("load_in_4bit", "load_in_8bit") if self.load_in_4bit else ("load_in_8bit", "load_in_4bit")
            raise ValueError(f"{wrong[0]} belongs to {other} and does nothing with {kind}; leave it out")
        return self

    @property
    def bits(self) -> int:
        return 4 if self.load_in_4bit else 8


def checked_device(device: str | int, words: Iterable[str] = ()) -> str | int:
    """A device as transformers takes it, where `"1"` is the number 1. ValueError for what is none."""
    if not _DEVICE.fullmatch(str(device)):
        known = [*words, "cpu", "cuda:0"]
        raise ValueError(f"{device!r} is no device; allowed are {', '.join(known)}, or a GPU's number."
                         f"{did_you_mean(str(device), known)}")  # fmt: skip
    return int(device) if str(device).isdigit() else device


def checked_memory(memory: dict[str, str | int] | None) -> dict[str, str | int] | None:
    """`max_memory`; ValueError for a device that is none, or an amount that accelerate cannot read."""
    for device, amount in (memory or {}).items():
        checked_device(device)
        if not (isinstance(amount, int) and amount > 0) and not _BYTES.fullmatch(str(amount)):
            raise ValueError(f"{device}: {amount!r} is no amount of memory; write bytes, or such as 20GiB")
    return memory
