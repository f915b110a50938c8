"""What one arm costs: its weights, gradients, optimizer and activations on one device, and its files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import TrainingArguments

from fish_tuning.experiments.costs.batches import Shapes
from fish_tuning.experiments.costs.devices import FrozenParts, Sizes
from fish_tuning.experiments.costs.fake_models import groups_of, make_fake, mask_fake
from fish_tuning.experiments.costs.kernels import matmul_workspace
from fish_tuning.experiments.costs.optimizers import OptimizerState, Trained, optimizer_state, step_bytes
from fish_tuning.experiments.costs.quantized import StoredWeights, quantize_like
from fish_tuning.experiments.costs.repeated_layers import Peaks, repeated_layers
from fish_tuning.experiments.costs.scoring_pass import ScoringPeak, scoring_peak
from fish_tuning.experiments.costs.training_pass import training_pass
from fish_tuning.files.sizes import Described, delta_size, mask_size, safetensors_size
from fish_tuning.sparse.frozen_parts import is_large

# What torch.save adds for each tensor: its record's header, padding to 64 bytes, and its entry in the directory.
_RECORD = 265
_ARCHIVE = 1200  # and for the whole file
# The same where the states of small masked tensors lie in one memory: for each of them, and for the memory.
_SLICE, _MEMORY = 68, 190
_JOINS = ("adamw_torch", "adamw_torch_fused")


@dataclass(frozen=True)
class Files:
    """Bytes on disk. `adapter` and `mask` are exact; `checkpoint` is both with the optimizer's state, to some kB.

    `mask` is None for an arm that has none, `adapter` where PEFT cannot say what it would save.
    """

    adapter: int | None
    mask: int | None
    checkpoint: int | None


@dataclass(frozen=True)
class Measured:
    """All that is known of an arm on one device, and why there are no activations where there are none."""

    sizes: Sizes
    masked: int  # of `sizes.replicated`: positions of the selected entries
    state: OptimizerState
    files: Files
    live: Peaks | None
    calibration: ScoringPeak | None
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """What an arm does: `kept` of the entries of each tensor of its pool train, and all of what is in no pool.

    Args:
        model: without weights, in which all of the pool trains; it is used up.
        kept: by the tensors' names; those that train as a whole are not in it.
        has_mask: whether a mask is saved, also one that leaves nothing out.
        batch, calibration: the largest batch that is trained on, and that is scored.
        score: that its entries are judged by; None where nothing is scored.
        warmup_steps: before they are.
        fused_head: whether trl's head takes the place of the model's.
    """

    model: Any
    kept: Mapping[str, int]
    has_mask: bool
    args: TrainingArguments
    batch: Shapes
    calibration: Shapes
    quantization: StoredWeights | None
    score: str | None
    warmup_steps: int
    fused_head: bool
    gpu: bool


def measure(work: Work) -> Measured:
    """Sizes from the shapes of the tensors, and the peak of a pass that is done on tensors without memory."""
    model, kept = work.model, work.kept
    if work.quantization is not None:
        quantize_like(model, work.quantization)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    held = [Trained(kept.get(name, parameter.numel()), parameter.dtype) for name, parameter in trained.items()]
    state = optimizer_state(optimizer_name(work.args), held)
    failures: list[str] = []
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    make_fake(model, mode)
    with mode:
        files = _files(work, state, failures)
    calibration = None
    if work.score is not None:
        try:
            calibration = scoring_peak(
                model, mode, work.calibration, work.args, work.score, work.warmup_steps, gpu=work.gpu
            )
        except Exception as error:  # a model may do what cannot be done without values
            failures.append(f"calibration could not be traced ({_reason(error)})")
    frozen_parts = _frozen_parts(model, kept)
    with mode:
        beside = mask_fake(model, kept, work.gpu)
    sizes = replace(_sizes(model, beside, held, state, work), frozen_parts=frozen_parts)
    live = None
    try:
        live = training_pass(
            model, mode, work.batch, work.args, gpu=work.gpu, fused_head=work.fused_head, beside=beside
        )
    except Exception as error:
        failures.append(f"activations could not be traced ({_reason(error)})")
    positions = sum(tensor.nbytes for tensor in beside if tensor.dtype is torch.int32)
    return Measured(sizes, positions, state, files, live, calibration, tuple(failures))


def optimizer_name(args: TrainingArguments) -> str:
    return str(getattr(args.optim, "value", args.optim))


def spread(kept: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """So many entries over tensors of these sizes, in proportion; the largest remainders get what is left.

    A mask puts them elsewhere, which changes none of the sums.
    """
    total = sum(sizes.values())
    shares = {name: divmod(kept * size, total) for name, size in sizes.items()}
    counts = {name: whole for name, (whole, _) in shares.items()}
    left = kept - sum(counts.values())
    for name in sorted(shares, key=lambda name: -shares[name][1])[:left]:
        counts[name] += 1
    return counts


def _frozen_parts(model: nn.Module, kept: Mapping[str, int]) -> FrozenParts:
    """Of masked tensors, those that FSDP gathers with their layers."""
    large = {n: p.nbytes for n, p in model.named_parameters() if kept.get(n) and is_large(p)}
    paths = {id(module): f"{path}." for path, module in model.named_modules()}
    layers = [
        sum(size for name, size in large.items() if name.startswith(paths[id(layer)]))
        for each in repeated_layers(model)
        for layer in each
    ]
    total = sum(large.values())
    return FrozenParts(total, max(layers, default=0), total - sum(layers))


def _sizes(model: nn.Module, beside: list[Any], held: list[Trained], state: OptimizerState, work: Work) -> Sizes:
    parameters = list(model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    lists = repeated_layers(model)
    layers = [sum(p.nbytes for p in layer.parameters()) for each in lists for layer in each]
    total = sum(parameter.nbytes for parameter in parameters)
    trained = sum(tensor.nbytes for tensor in held)
    mixed = work.args.bf16 or work.args.fp16
    low = sum(tensor.entries for tensor in held if tensor.dtype.itemsize == 2 or mixed)
    return Sizes(
        parameters=total,
        replicated=buffers + sum(tensor.nbytes for tensor in beside),
        buffers=buffers,
        largest_layer=max(layers, default=0),
        rest=total - sum(layers),
        trained=trained,
        gradients=trained,
        optimizer=state.nbytes,
        copies=4 * low,
        step=step_bytes(optimizer_name(work.args), held, work.gpu),
        workspace=matmul_workspace() if work.gpu else 0,
        accumulates=work.args.gradient_accumulation_steps,
    )


def _files(work: Work, state: OptimizerState, failures: list[str]) -> Files:
    """Of a model without weights, before anything in it is masked."""
    model = work.model
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    mask = mask_size(shapes) if work.has_mask else None
    optimizer = state.nbytes + _records(work, state) + _ARCHIVE
    if not isinstance(model, PeftModel):
        trained = {name: _described(p) for name, p in model.named_parameters() if p.requires_grad}
        whole = safetensors_size(_whole(model), {"format": "pt"})
        return Files(delta_size(trained, work.kept), mask, whole + (mask or 0) + optimizer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is told when it is saved
            saved = get_peft_model_state_dict(model)
        adapter = safetensors_size({name: _described(tensor) for name, tensor in saved.items()}, {"format": "pt"})
    except Exception as error:  # PEFT's methods raise whatever comes
        failures.append(f"the adapter's file is not known ({_reason(error)})")
        return Files(None, mask, None)
    return Files(adapter, mask, adapter + (mask or 0) + optimizer)


def _records(work: Work, state: OptimizerState) -> int:
    together = [len(group) for group in groups_of(work.model, work.kept, work.gpu) if len(group) > 1]
    if optimizer_name(work.args) not in _JOINS or not together:
        return _RECORD * state.tensors
    each = 3  # two moments, and the count of steps
    return _RECORD * (state.tensors - each * sum(together)) + each * (_SLICE * sum(together) + _MEMORY * len(together))


def _whole(model: nn.Module) -> dict[str, Described]:
    """All that a model saves, tied tensors once."""
    parameters = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - parameters.keys()
    return {name: _described(tensor) for name, tensor in model.state_dict().items() if name not in tied}


def _described(tensor: Any) -> Described:
    return Described(tensor.dtype, tuple(tensor.shape))


def _reason(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:120]}" if first else type(error).__name__
