"""What is checked before and after scoring, so that no score is wrong in silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import get_args

import torch
from torch import nn

from fish_tuning.errors import FisherError
from fish_tuning.model_walks import every_module, every_tensor, in_one_memory
from fish_tuning.peft_methods import refusal
from fish_tuning.scores.finite import tensors_of
from fish_tuning.scores.loss_vectors import LossFunction
from fish_tuning.scores.losses import FisherType, TokenReduction
from fish_tuning.scores.quantized import check_unpacked
from fish_tuning.sparse.masked_tensors import masked_tensors, trains_masked
from fish_tuning.sparse.sharding import FSDP1, FSDP2, ZERO3, engine_of

SCORES_DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # float16 has no room for small squares
SEEDS = range(-(2**62), 2**62)  # leaves room for a generator of its own for each example


def check_arguments(
    model: nn.Module,
    fisher_type: str,
    token_reduction: str,
    method: str,
    loss_fn: LossFunction | None,
    num_samples: object,
    seed: object,
    scores_dtype: torch.dtype,
) -> None:
    """FisherError for what `calculate_fisher_information` does not take."""
    if not isinstance(model, nn.Module):
        raise FisherError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    for name, value, allowed in (
        ("fisher_type", fisher_type, get_args(FisherType)),
        ("token_reduction", token_reduction, get_args(TokenReduction)),
        ("method", method, ("auto", "loop")),
    ):
        if value not in allowed:
            raise FisherError(f"{name}={value!r} is not known; allowed are {', '.join(map(repr, allowed))}.")
    if scores_dtype not in SCORES_DTYPES:
        raise FisherError(
            f"scores_dtype={scores_dtype} cannot hold squared gradients, which are far below 1; allowed are "
            f"{', '.join(map(str, SCORES_DTYPES))}."
        )
    if loss_fn is not None and fisher_type != "empirical":
        raise FisherError(f"loss_fn gives losses for the given labels, so fisher_type={fisher_type!r} cannot use it.")
    if num_samples is not None and (not isinstance(num_samples, Integral) or num_samples < 1):
        raise FisherError(
            f"num_samples={num_samples!r} must be a whole number of at least 1, or None for the whole loader."
        )
    if not isinstance(seed, Integral) or seed not in SEEDS:
        raise FisherError(f"seed={seed!r} must be a whole number between -2**62 and 2**62.")


def check_warmup(steps: object) -> None:
    """FisherError for a number of warm-up steps that is none."""
    if steps is not None and (not isinstance(steps, Integral) or steps < 0):
        raise FisherError(
            f"warmup_steps={steps!r} must be a whole number of at least 0, or None for what the start needs."
        )


def check_split(split: object) -> None:
    """FisherError for a way to share out the examples that is none."""
    if split not in (True, False, "already"):
        raise FisherError(f"split_between_processes={split!r} must be True, False or 'already'.")


def check_rows_per_example(rows: object, loss_fn: LossFunction | None) -> None:
    """FisherError for groups of rows that are none, or that no loss is known of."""
    if not isinstance(rows, int) or rows < 1:
        raise FisherError(f"rows_per_example={rows!r} must be a whole number of at least 1.")
    if rows > 1 and loss_fn is None:
        raise FisherError(f"rows_per_example={rows} needs loss_fn=f, where f(outputs, batch) gives one loss a group.")


def check_model(model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> None:
    """FisherError for a model that cannot be scored, whatever the data."""
    if not trainable:
        raise FisherError("The model has no trainable tensor (requires_grad=True); there is nothing to score.")
    modules = every_module(model)
    if reason := refusal({kind.__name__ for kind in set(map(type, modules))}, "scored"):
        raise FisherError(reason)
    if trains_masked(model):
        raise FisherError(
            "The model has a mask applied; its tensors cannot be scored as a whole. Call remove_mask(model) first."
        )
    for name, parameter in trainable.items():
        if parameter.is_complex():
            raise FisherError(
                f"{name!r} is {parameter.dtype}, and scores are squares of real gradients. Set requires_grad_(False) "
                "on it, or hold its real and imaginary parts as real tensors (torch.view_as_complex in forward)."
            )
        if engine_of(parameter) in (FSDP2, ZERO3):
            raise FisherError(
                f"{name!r} is sharded: this process holds a part of it. Score the model before tensor parallelism "
                "shards it, save_mask, and train with that mask; or shard it with FSDP2 (fully_shard) or DeepSpeed "
                "ZeRO-3. Under torchrun or accelerate launch each process then scores its share of the examples."
            )
    scripted = [each for each in modules if isinstance(each, torch.jit.ScriptModule)]
    in_script = {id(parameter) for module in scripted for parameter in module.parameters(recurse=False)}
    if own := [name for name, parameter in trainable.items() if id(parameter) in in_script]:
        raise FisherError(
            f"{own[0]!r} is a tensor of a TorchScript module, in which nothing can take its place to get an example's "
            "gradient. Score the module that torch.jit.script or torch.jit.trace was given, or set "
            "requires_grad_(False) on its parameters, one by one."
        )
    if shared := in_one_memory(trainable):
        name, names = next(iter(shared.items()))
        raise FisherError(
            f"{name!r} is in one memory with {', '.join(repr(each) for each in names if each != name)}, as a parameter "
            "of its own (PEFT's ensure_weight_tying makes such pairs), so that neither's gradient is that of their "
            "entries. Tie them as one nn.Parameter, or leave both out with requires_grad_(False)."
        )
    check_unpacked(model)
    offloaded = any("_hf_hook" in vars(module) for module in modules)  # weights come when needed
    frozen = (tensor.frozen for tensor in masked_tensors(model))
    tensors = trainable.values() if offloaded else (*every_tensor(model), *frozen)
    if not any(tensor.is_meta or engine_of(tensor) == FSDP1 for tensor in tensors):
        return
    for name, tensor in trainable.items() if offloaded else tensors_of(model):
        if engine_of(tensor) == FSDP1:
            raise FisherError(
                f"{name!r} lies in a flat tensor of {FSDP1}. Score the wrapped model (a Trainer's model_wrapped), not "
                "what is inside; a start along the gradient comes before it is wrapped."
            )
        if tensor.is_meta:
            raise FisherError(
                f"{name!r} is on the meta device: it has a shape, but no values. Load the model's weights first."
            )


@contextmanager
def device_errors_explained(model: nn.Module, target: torch.device) -> Iterator[None]:
    """A RuntimeError about devices, from a model that lies on several, as a FisherError that names tensors on each."""
    try:
        yield
    except RuntimeError as error:
        places = {tensor.device: name for name, tensor in tensors_of(model) if tensor.device != target}
        if not places or "same device" not in str(error):
            raise
        found = ", ".join(f"{name!r} is on {device}" for device, name in places.items())
        raise FisherError(
            f"The model lies on several devices: the batches go to {target}, but {found}. Move it whole "
            "(model.to(device)), or load it with a device_map, which moves what passes between its parts."
        ) from error
