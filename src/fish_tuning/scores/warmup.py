"""Some dense steps before scoring, undone after it: a start where one factor is zero hides what the other is worth."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fish_tuning.peft_methods import PEFT_METHODS, WARMUP_STEPS
from fish_tuning.scores.batches import Batch, batch_size, rows
from fish_tuning.scores.loss_vectors import LossVectors
from fish_tuning.scores.plain_gradients import PlainGradients
from fish_tuning.scores.reading import read

logger = logging.getLogger("fish_tuning.scores.fisher")

WARMUP_EXAMPLES = 32  # at most in a step, so that a long loader is neither kept in memory nor trained on twice
WARMUP_LEARNING_RATE = 2e-3
MAX_NORM = 1.0  # of a step's gradient, as the Trainer clips it


def warmup_steps_needed(model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> int:
    """`WARMUP_STEPS` where a part of a PEFT adapter that trains is exactly zero beside others that are not, else 0.

    The others are multiplied with it and have no gradient: with PEFT's default LoRA, B = 0, every A scores zero. Where
    B alone trains nothing is hidden. Methods that are known to start away from zero, trained adapters and models
    without PEFT need none.
    """
    if not getattr(model, "peft_config", None) or _starts_away_from_zero(model):
        return 0
    trained = (
        parameter for name, parameter in trainable.items() if "modules_to_save" not in name and not parameter.is_meta
    )
    zero = {not bool(left) for left in read(parameter.count_nonzero() for parameter in trained)}
    return WARMUP_STEPS if len(zero) == 2 else 0


def _starts_away_from_zero(model: Any) -> bool:
    """Of all adapters."""
    kinds = {str(getattr(config.peft_type, "value", config.peft_type)) for config in model.peft_config.values()}
    return kinds <= {
        (method.peft_type or name).upper() for name, method in PEFT_METHODS.items() if method.starts_away_from_zero
    }


@contextmanager
def warmed_up(
    model: nn.Module,
    trainable: dict[str, nn.Parameter],
    losses: LossVectors,
    batches: Sequence[Batch],
    steps: int,
    *,
    places: Sequence[Sequence[int]] | None = None,
    learning_rate: float = WARMUP_LEARNING_RATE,
    seed: int = 0,
    progress: bool = False,
) -> Iterator[None]:
    """The model after `steps` of AdamW on `trainable`; at the end, however it comes, it is back to the bit.

    The steps are one pass over the examples, whatever the size of the batches that they come in: what has been seen
    several times is learned by heart, and the gradients that are then scored are those of chance. Stand-ins that share
    the parameters' memory get the gradients, so hooks and gradients of the parameters' own see nothing of it. (Copies
    would not do: activation checkpointing computes again with the parameters.) The mode is the caller's: that of
    scoring has no dropout, so the steps are the same every time.

    Raises FisherError for a loss that is not finite, before anything is scored.

    Args:
        losses: of each example alone, for the given labels; their mean is trained on.
        batches: of the examples. Each step takes a run of them, `seed` says in which order.
        steps: as many, or one an example where there are fewer examples.
        places: as `step_parts` takes them.
        progress: show a progress bar, since this takes as long as training does.
    """
    if not steps:
        yield
        return
    before = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    try:
        if batches:
            parts = step_parts(batches, steps, seed, places)
            logger.info("Fisher information: scored after %d warm-up steps, which are undone.", len(parts))
            with tqdm(parts, desc="Warm-up before scoring", unit="step", disable=not progress, leave=False) as bar:
                _train(model, trainable, losses, bar, learning_rate)
        example = losses.first_not_finite()
        if example is None:
            yield
    finally:
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(before[name])
    if example is not None:  # told of the weights as they were, which a step along a loss that is NaN makes NaN, too
        raise losses.not_finite(example)


class Part(NamedTuple):
    """Rows of a batch: a part of the examples of a step."""

    rows: Batch
    first_example: int
    weight: float  # share of the step's examples


def step_parts(
    batches: Sequence[Batch], steps: int, seed: int, places: Sequence[Sequence[int]] | None = None
) -> list[list[Part]]:
    """The examples in as many runs of equal length, each as rows of the batches that it lies in, in random order.

    What a last batch holds beyond the examples of so many steps is left out, so that no size of batches matters.

    Args:
        places: of each batch's rows among all examples, ascending; default: one batch behind another.
    """
    starts = list(accumulate((batch_size(batch) for batch in batches), initial=0))
    examples = min(starts[-1], WARMUP_EXAMPLES * steps)
    steps = min(steps, examples)
    bounds = [examples * step // steps for step in range(steps + 1)]
    in_order = [range(start, end) for start, end in pairwise(starts)] if places is None else places
    runs = []
    for low, high in pairwise(bounds):
        parts = []
        for batch, own in zip(batches, in_order, strict=True):
            first, last = bisect_left(own, low), bisect_left(own, high)
            if first < last:
                parts.append(Part(rows(batch, first, last), own[first], (last - first) / (high - low)))
        runs.append(parts)
    order = torch.randperm(steps, device="cpu", generator=torch.Generator().manual_seed(seed % 2**63))
    return [runs[number] for number in order.tolist()]


def _train(
    model: nn.Module,
    trainable: dict[str, nn.Parameter],
    losses: LossVectors,
    steps: Iterable[Sequence[Part]],
    learning_rate: float,
) -> None:
    stand_ins = {name: parameter.detach().requires_grad_() for name, parameter in trainable.items()}
    in_place = PlainGradients(model, trainable).in_place(stand_ins)
    stepped = {name: _in_32_bits(tensor) for name, tensor in stand_ins.items()}
    optimizer = torch.optim.AdamW(stepped.values(), lr=learning_rate, weight_decay=0.0)
    for parts in steps:
        for part in parts:
            (loss,) = losses(losses.trimmed(part.rows), part.first_example, in_place)
            (part.weight * loss.mean()).backward()
        for name, tensor in stand_ins.items():
            if stepped[name] is not tensor and tensor.grad is not None:
                stepped[name].grad, tensor.grad = tensor.grad.float(), None
        nn.utils.clip_grad_norm_(stepped.values(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, tensor in stand_ins.items():
                if stepped[name] is not tensor:
                    tensor.copy_(stepped[name])


def _in_32_bits(tensor: Tensor) -> Tensor:
    """What AdamW steps on: in 16 bits a step is lost beside a value near 1, and fp16 makes squares and epsilon zero."""
    return tensor if tensor.dtype.itemsize > 2 else tensor.detach().float().requires_grad_()
