"""A model in the precision, and with the activation checkpointing, that a Trainer trains it with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

# What transformers writes onto modules where it checkpoints their activations.
_CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")
_HOOKS = "_require_grads_hooks"
_WRITTEN = (*_CHECKPOINTING, _HOOKS, "_require_grads_hook")
_NOTHING = object()


@contextmanager
def as_trained(model: Any, args: Any, device: torch.device | None = None) -> Iterator[None]:
    """What is scored within is scored as a Trainer with these arguments trains: their autocast, their checkpointing.

    The model is then as it was before. Checkpointing that is on already stays as it is. `device` is where the model
    computes, by default the arguments'.
    """
    dtype = autocast_dtype(args)
    autocast = nullcontext() if dtype is None else torch.autocast((device or args.device).type, dtype)
    with autocast, _checkpointed(model, args) if checkpoints(args) else nullcontext():
        yield


def autocast_dtype(args: Any) -> torch.dtype | None:
    """In which the arguments' mixed precision computes; None without it."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def checkpoints(args: Any) -> bool:
    """Whether activations are recomputed."""
    return bool(args.activation_checkpointing)


def checkpoint_activations(model: Any, args: Any, **more: Any) -> None:
    """As the Trainer does where it begins; `more` goes to `torch.utils.checkpoint`, too."""
    settings = {"use_reentrant": False, **(args.activation_checkpointing_kwargs or {})}
    every, offload = settings.pop("every_n_layers", 1), settings.pop("offload", False)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs=settings | more, every_n_layers=every, offload=offload
        )
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings | more)


@contextmanager
def _checkpointed(model: nn.Module, args: Any) -> Iterator[None]:
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        yield
        return
    before = [(module, {name: vars(module).get(name, _NOTHING) for name in _WRITTEN}) for module in model.modules()]
    try:
        checkpoint_activations(model, args)
        yield
    finally:
        for module, written in before:
            hooks = vars(module).get(_HOOKS)
            if hooks and hooks is not written[_HOOKS]:
                for hook in hooks:
                    hook.remove()
            for name, value in written.items():
                if value is not _NOTHING:
                    setattr(module, name, value)
                elif name in vars(module):
                    delattr(module, name)
