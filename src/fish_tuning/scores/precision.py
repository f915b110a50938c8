"""Whole fp32 products for a while, whatever fp32 precision the user has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of fp32 tensors in fp32: neither in TF32, with 10 bits behind the point, nor in bf16.

    A user's `torch.set_float32_matmul_precision("high")` is for training. Between two ways to the same gradient it
    leaves differences of a few thousandths, as large as those that tell a wrong rule. cuDNN's convolutions have TF32 on
    by themselves. What is set is there again afterwards.
    """
    settings = _settings()
    before = [setting.fp32_precision for setting in settings]
    lowered = [(setting, was) for setting, was in zip(settings, before, strict=True) if was not in ("none", "ieee")]
    for setting, _ in lowered:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, was in lowered:
            setting.fp32_precision = "none"  # what the setting above it says, if that is what it went by
            if setting.fp32_precision != was:
                setting.fp32_precision = was


def _settings() -> list[Any]:
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):  # torch before 2.9
        return [_Matmul(), _Convolutions()]
    mkldnn = [getattr(backends.mkldnn, name) for name in ("matmul", "conv", "rnn")]
    return [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, *mkldnn]


class _Matmul:
    """`fp32_precision` by the older names of torch, for matrix products."""

    @property
    def fp32_precision(self) -> str:
        precision = torch.get_float32_matmul_precision()
        return "ieee" if precision == "highest" else precision

    @fp32_precision.setter
    def fp32_precision(self, precision: str) -> None:
        torch.set_float32_matmul_precision("highest" if precision in ("ieee", "none") else precision)


class _Convolutions:
    """The same for cuDNN."""

    @property
    def fp32_precision(self) -> str:
        return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"

    @fp32_precision.setter
    def fp32_precision(self, precision: str) -> None:
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
