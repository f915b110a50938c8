"""The one place that says where the tests compute: FISH_TUNING_DEVICE=cuda runs the same suite on a GPU."""

from __future__ import annotations

import os

import torch

DEVICE = torch.device(os.environ.get("FISH_TUNING_DEVICE", "cpu"))
