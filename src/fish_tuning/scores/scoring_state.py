"""Put a model into the state it is scored in, and everything back as it was."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from fish_tuning.model_walks import attribute, every_module, every_parameter
from fish_tuning.scores.bare_model import uncompiled, without_mixed_precision
from fish_tuning.scores.buffers import buffers_kept
from fish_tuning.scores.mixed_precision import Autocast
from fish_tuning.scores.quantized import allow_packing, keep_unpacked

_TABLES = nn.Embedding, nn.EmbeddingBag


@contextmanager
def scoring_state(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout), no key-value cache, gradients on; buffers and every device's random state kept.

    What `torch.compile` and accelerate's mixed precision have put into the model is off. So is an autocast around the
    call; who computes losses puts it around each forward pass (`Autocast`, made before this is entered).

    Activation checkpointing stays in force, since a model may not fit without it. transformers ties it to training
    mode, so the checkpointed layers alone keep that flag, and are in evaluation mode while they compute.

    4-bit layers on the CPU stay unpacked, which a pass in evaluation mode would otherwise change for good.
    """
    modes = {module: module.training for module in every_module(model)}
    with ExitStack() as stack:
        stack.enter_context(buffers_kept(model))
        stack.enter_context(random_state_kept(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(Autocast(model).off())
        try:
            uncompiled(stack)
            stack.callback(setattr, checkpointing, "CheckpointFunction", checkpointing.CheckpointFunction)
            checkpointing.CheckpointFunction = _NotReentrant  # type: ignore[assignment,misc]
            without_mixed_precision(model, stack)
            stack.callback(allow_packing, keep_unpacked(model))
            for module in modes:  # not by eval(), with which some layers merge what trains into what does not
                if module.training:
                    _set_training(module, False)
            for module in modes:
                if attribute(module, "gradient_checkpointing") and hasattr(module, "_gradient_checkpointing_func"):
                    _keep_checkpointing(module, stack)
                # No rule needs sparse gradients, and neither AdamW nor sums of plain gradients take them as they come.
                if isinstance(module, _TABLES) and attribute(module, "sparse"):
                    _set(module, "sparse", False, stack)
                if isinstance(module, nn.RNNBase):  # cuDNN's have a backward pass in training mode alone
                    _set(module, "dropout", 0.0, stack)
                    _set_training(module, True)
            config = getattr(model, "config", None)
            if getattr(config, "use_cache", None):
                _set(config, "use_cache", False, stack)
            if getattr(config, "problem_type", False) is None:  # a model that is given labels writes there what it sees
                stack.callback(setattr, config, "problem_type", None)
            yield
        finally:
            for module, training in modes.items():
                if module.training is not training:
                    _set_training(module, training)


def _set_training(module: nn.Module, training: bool) -> None:
    own = vars(module)
    if type(module).__setattr__ is nn.Module.__setattr__ and "training" in own:
        own["training"] = training  # as that does in the end; hundreds of modules would take a percent of a short call
    else:
        module.training = training


class _NotReentrant:
    """In the place of torch's `CheckpointFunction`, for modules that checkpoint what they call by themselves.

    Reentrant checkpointing cannot serve torch.autograd.grad, nor a backward pass to given inputs.
    """

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        if any(isinstance(each, Tensor) and each.requires_grad for each in args):
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)
        return CheckpointFunction.apply(function, preserve, *args)  # which hands no gradient on, in training neither


def _keep_checkpointing(module: nn.Module, stack: ExitStack) -> None:
    # Reentrant checkpointing cannot serve torch.autograd.grad.
    own: Any = module._gradient_checkpointing_func
    function = own.func if isinstance(own, partial) else checkpoint  # transformers' own, where inputs are offloaded
    function = partial(function, use_reentrant=False)
    from transformers.modeling_layers import GradientCheckpointingLayer  # which is there where such layers are

    if isinstance(module, GradientCheckpointingLayer):
        module.training = True
        _set(module, "_gradient_checkpointing_func", partial(_in_evaluation, module, function), stack)
    elif _checkpoints_itself(module):
        module.training = True
        _set(module, "_gradient_checkpointing_func", function, stack)
        # What its forward pass drops besides.
        for owner in (module, getattr(module, "config", None)):
            for name, value in list(vars(owner).items()) if owner is not None else ():
                if "drop" in name and isinstance(value, float):
                    _set(owner, name, 0.0, stack)


def _in_evaluation(module: nn.Module, function: Callable[..., Any], forward: Callable[..., Any], *args: Any) -> Any:
    """Checkpoints a layer's forward pass, which is to drop nothing, nor is it when it is done again."""

    def run(*args: Any) -> Any:
        module.training = False
        try:
            return forward(*args)
        finally:
            module.training = True

    return function(run, *args)


def _checkpoints_itself(module: nn.Module) -> bool:
    """Whether the code of a module checkpoints what it calls: that of models from elsewhere, since transformers 5."""
    try:
        return "_gradient_checkpointing_func(" in inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return True


def _set(owner: Any, name: str, value: Any, stack: ExitStack) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Of torch on every device, and of Python and NumPy, which data loaders and collators draw from."""
    parameters = every_parameter(model) if torch.accelerator.is_available() else []
    devices = {parameter.device for parameter in parameters if parameter.device.type not in ("cpu", "meta")}
    kinds = {device.type for device in devices} or {"cuda"}
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        for kind in sorted(kinds):
            stack.enter_context(
                torch.random.fork_rng([device.index for device in devices if device.type == kind], device_type=kind)
            )
        yield
