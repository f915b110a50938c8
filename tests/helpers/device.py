"""The one place that says where the tests compute: FISH_TUNING_DEVICE=cuda runs the same suite on a GPU."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from torch import nn

DEVICE = torch.device(os.environ.get("FISH_TUNING_DEVICE", "cpu"))
M = TypeVar("M", bound=nn.Module)


def placed(model: M) -> M:
    """The model on the tests' device; one without weights stays as it is."""
    return model if next(model.parameters()).is_meta else model.to(DEVICE)
