"""A forward and backward pass over the largest batch, on tensors without memory: what is alive at its peak."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import convert_to_fp32  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import TrainingArguments

from fish_tuning.experiments.costs.batches import Shapes, made, taken
from fish_tuning.experiments.costs.kernels import GpuKernels, NoChance
from fish_tuning.experiments.costs.live_bytes import LiveBytes
from fish_tuning.experiments.costs.repeated_layers import Peaks, of_all_layers
from fish_tuning.experiments.costs.unknown_values import decided
from fish_tuning.training.as_trained import autocast_dtype, checkpoint_activations, checkpoints

Loss = Callable[[Any, dict[str, Tensor]], Tensor]


def training_pass(
    model: Any,
    mode: FakeTensorMode,
    batch: Shapes,
    args: TrainingArguments,
    *,
    gpu: bool,
    fused_head: bool = False,
    beside: Iterable[Tensor] = (),
) -> Peaks:
    """The bytes of a training step of transformers' Trainer, or of trl's with `fused_head`, up to its optimizer.

    Mixed precision and activation checkpointing are those of `args`; the model is changed as the Trainer changes it.

    Args:
        model: a fake model, with the mask of its arm.
        mode: that its tensors were made in.
        batch: shapes of one device's batch.
        gpu: whether kernels are to keep what they keep on a GPU.
        beside: tensors that are there before, which are no parameters or buffers of the model.
    """
    if checkpoints(args):
        checkpoint_activations(model, args, **with_gpu_kernels(args, gpu))
    if fused_head:
        add_fused_head(model)
    model.train()
    dtype = autocast_dtype(args)
    held = [*model.parameters(), *model.buffers(), *beside]

    def loss(inputs: dict[str, Any]) -> Tensor:
        if fused_head:
            inputs = {**inputs, "use_cache": False, "fused_lm_head": True}
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            outputs = model(**inputs)
        if dtype is not None:
            outputs = convert_to_fp32(outputs)
        found: Tensor = -outputs.log_probs.sum() if fused_head else outputs["loss"]
        return found

    def step() -> LiveBytes:
        with counted(model, mode, held, gpu=gpu) as live:
            inputs = made(taken(model, batch))
            found = loss(inputs)
            del inputs
            found.backward()
        return live

    return of_all_layers(model, step)


@contextmanager
def counted(model: nn.Module, mode: FakeTensorMode, held: Iterable[Tensor], *, gpu: bool) -> Iterator[LiveBytes]:
    """Count what comes into being inside, beside what is `held` before; gradients of the model's parameters go then."""
    live = LiveBytes(held)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        for handle in live.of_gradients(trained):
            stack.callback(handle.remove)
        stack.callback(model.zero_grad)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of shapes, which nobody runs
        log = logging.getLogger(FakeTensorMode.__module__)
        stack.callback(setattr, log, "disabled", log.disabled)
        log.disabled = True  # it writes out the traceback of what cannot be traced, and a note tells of that
        stack.enter_context(mode)
        stack.enter_context(decided(model))
        stack.enter_context(live)
        stack.enter_context(NoChance())
        if gpu:
            stack.enter_context(GpuKernels())
        yield live


def with_gpu_kernels(args: TrainingArguments, gpu: bool) -> dict[str, Any]:
    """How what is computed again is computed with a GPU's kernels where the first pass is.

    Modes that see functions are off in a backward pass.
    """
    settings: Any = args.activation_checkpointing_kwargs or {}
    reentrant = settings.get("use_reentrant", False)
    return {"context_fn": lambda: (nullcontext(), GpuKernels())} if gpu and not reentrant else {}


def add_fused_head(model: Any) -> None:
    """The head that trl's SFTTrainer puts on, which makes the logits tile by tile."""
    from trl.trainer.utils import add_fused_lm_head

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
