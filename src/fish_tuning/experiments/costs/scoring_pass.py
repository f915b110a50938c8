"""Scores of all that trains, on tensors without memory: what calibration needs at its peak."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional as F
from transformers import TrainingArguments

from fish_tuning.experiments.costs.batches import LABELS, Shapes, first_rows, made, taken
from fish_tuning.experiments.costs.live_bytes import LiveBytes
from fish_tuning.experiments.costs.repeated_layers import of_all_layers
from fish_tuning.experiments.costs.training_pass import counted
from fish_tuning.scores.batches import one_by_one_is_as_fast
from fish_tuning.scores.expansion import with_expansion_if_possible
from fish_tuning.scores.losses import TOKENWISE, loss_type_of
from fish_tuning.scores.mixed_precision import Autocast
from fish_tuning.scores.named import MEAN_GRADIENT, SCORES
from fish_tuning.scores.probes import Probes
from fish_tuning.scores.scoring_state import scoring_state
from fish_tuning.scores.totals import Totals
from fish_tuning.scores.warmup import WARMUP_EXAMPLES
from fish_tuning.training.as_trained import as_trained, autocast_dtype


class ScoringPeak(NamedTuple):
    """Bytes of calibration above the model's weights."""

    scores: int  # that it ends with
    peak: int


def scoring_peak(
    model: Any,
    mode: FakeTensorMode,
    batch: Shapes,
    args: TrainingArguments,
    score: str,
    warmup_steps: int,
    *,
    gpu: bool,
) -> ScoringPeak:
    """What `calculate_scores` needs above the weights of a fake model in which all of the pool trains.

    Before anything is scored come warm-up steps: dense AdamW on all of it, beside a copy to go back to. Then a copy of
    the weights as they were scored stays, too. Mixed precision and activation checkpointing are those of `args`.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    entries = sum(parameter.numel() for parameter in trained.values())
    weights = sum(parameter.nbytes for parameter in trained.values())
    low = sum(parameter.numel() for parameter in trained.values() if parameter.dtype.itemsize <= 2)
    needs = SCORES[score].needs
    if not needs:
        return ScoringPeak(4 * entries, 4 * entries)
    held = [*model.parameters(), *model.buffers()]
    signed = MEAN_GRADIENT in needs

    def scored() -> LiveBytes:
        try:
            return _scored(model, mode, batch, held, signed, gpu)
        except DynamicOutputShapeException:  # which rows of an embedding a batch reads, its values say
            return _warmed_up(model, mode, batch, held)

    def warmed_up() -> LiveBytes:
        return _warmed_up(model, mode, batch, held)

    scores = 4 * entries * (2 if signed else 1)
    # In fp16 each batch may overflow, and be done again from a copy of the scores so far.
    dtypes = {autocast_dtype(args), *(parameter.dtype for parameter in model.parameters())}
    again = scores if torch.float16 in dtypes else 0
    with as_trained(model, args, torch.device("cpu")):
        peak = scores + again + (2 * weights if warmup_steps else 0) + of_all_layers(model, scored).peak()
        if warmup_steps:
            # Two numbers an entry in fp32, fp32 copies of what has 16 bits, and what a step makes new of all at once.
            state = 8 * entries + 4 * low
            stepping = 4 * entries + 4 * (entries if gpu else max(p.numel() for p in trained.values()))
            peak = max(peak, scores + weights + state + max(of_all_layers(model, warmed_up).peak(), stepping))
    return ScoringPeak(4 * entries, peak)


def _warmed_up(model: Any, mode: FakeTensorMode, batch: Shapes, held: list[Tensor]) -> LiveBytes:
    autocast = Autocast(model)
    with scoring_state(model), counted(model, mode, held, gpu=False) as live:
        inputs = made(taken(model, first_rows(batch, WARMUP_EXAMPLES)))
        _losses(model, inputs, autocast).mean().backward()
    return live


def _scored(model: Any, mode: FakeTensorMode, batch: Shapes, held: list[Tensor], signed: bool, gpu: bool) -> LiveBytes:
    with mode:
        alone = one_by_one_is_as_fast(made(batch), gpu)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if alone:
        return _one_by_one(model, mode, batch, held)
    with mode:
        totals = Totals.zeros(trained, torch.float32, None, signed)
    held = [*held, *totals.squares.values(), *(totals.gradients or {}).values()]
    probes, autocast = Probes(model, trained), Autocast(model)
    with scoring_state(model), probes, counted(model, mode, held, gpu=False) as live:
        inputs = made(taken(model, batch))

        def attempt() -> list[Tensor]:
            probes.start(next(iter(inputs.values())).shape[0], torch.device("cpu"), inputs)
            return [_losses(model, inputs, autocast)]

        probes.backward(with_expansion_if_possible(attempt, probes), totals)
    return live


def _one_by_one(model: Any, mode: FakeTensorMode, batch: Shapes, held: list[Tensor]) -> LiveBytes:
    def given_up(parameter: Tensor) -> None:
        parameter.grad = None

    autocast = Autocast(model)
    with ExitStack() as stack:
        stack.enter_context(scoring_state(model))
        live = stack.enter_context(counted(model, mode, held, gpu=False))
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(given_up).remove)
        _losses(model, made(taken(model, first_rows(batch, 1))), autocast).sum().backward()
    return live


def _losses(model: Any, inputs: dict[str, Tensor], autocast: Autocast) -> Tensor:
    """One an example, as scoring takes them from the logits; every token is taken to count."""
    with autocast.on():
        outputs: Any = model(**{name: tensor for name, tensor in inputs.items() if name not in LABELS})
    logits: Tensor = outputs.logits
    labels = next(inputs[name] for name in LABELS if name in inputs)
    if loss_type_of(model) in TOKENWISE:
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.new_zeros(logits.shape[:2]).flatten(), reduction="none"
        )
        return losses.view(logits.shape[:2]).sum(1)
    if labels.is_floating_point():
        return (logits.float() - labels.view_as(logits)).square().flatten(1).mean(1)
    return F.cross_entropy(logits.float(), labels.view(-1), reduction="none")
