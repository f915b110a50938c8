"""A model that is fit to be scored: bare, checked, and where it is to compute."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from fish_tuning.model_walks import named_parameters, walked_once
from fish_tuning.scores.bare_model import unwrapped
from fish_tuning.scores.sharded_models import gathered_layer_by_layer
from fish_tuning.scores.validation import check_model


class Prepared(NamedTuple):
    """The bare model, its trainable tensors by name, and the device that batches go to."""

    model: nn.Module
    trainable: dict[str, nn.Parameter]
    device: torch.device


def prepared(model: nn.Module, device: torch.device | str | None = None) -> Prepared:
    """Moves the model to `device` where one is given; by default it computes where its first trainable tensor is.

    Raises FisherError for a model that cannot be scored, whatever the data.
    """
    model = unwrapped(model)
    trainable = {name: parameter for name, parameter in named_parameters(model).items() if parameter.requires_grad}
    with walked_once(model):
        check_model(model, trainable)
    if device is None:
        return Prepared(model, trainable, next(iter(trainable.values())).device)
    move(model, device)
    return Prepared(model, trainable, torch.device(device))


def move(model: nn.Module, device: torch.device | str) -> None:
    """Move the model to `device`, unless it stays where it was loaded: one in parts, sharded, or in 8 bits."""
    in_parts = hasattr(model, "hf_device_map") or gathered_layer_by_layer(model)
    if not in_parts and not getattr(model, "is_loaded_in_8bit", False):
        model.to(device)
