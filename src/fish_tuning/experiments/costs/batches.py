"""The largest batch of a training, as shapes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.data.tasks import Task
from fish_tuning.files.sizes import Described

LABELS = ("labels", "label", "label_ids")
Shapes = dict[str, Described]


def largest_batch(task: Task, processing_class: Any, max_length: int, size: int, tokens: int | None = None) -> Shapes:
    """The shapes of a batch of `size` examples that is as long as the longest training example.

    Batches are padded to their longest example, and every epoch has one with the longest of all. With `tokens` it is
    taken to be that long instead.

    Raises ConfigurationError for `tokens` where examples are no texts.
    """
    encoded = task.usable(task.train_split, task.encode(task.train, processing_class, max_length))
    longest = list(range(min(size, len(encoded))))
    length = None
    if "input_ids" in encoded.column_names:
        lengths = [len(ids) for ids in encoded["input_ids"]]
        longest = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)[:size]
        length = lengths[longest[0]]
    elif tokens is not None:
        raise ConfigurationError(
            f"--tokens {tokens}: {task.name} is {task.kind.replace('_', ' ')}, whose examples have no tokens. Leave "
            "it out."
        )
    rows = [encoded[place] for place in longest]
    batch = task.collator(processing_class)(rows)
    shapes = {name: Described(t.dtype, tuple(t.shape)) for name, t in batch.items() if isinstance(t, Tensor)}
    padded = next((shape[1] for name, (_, shape) in shapes.items() if name == "input_ids"), None)

    def long(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        full = (size, *shape[1:])  # a data set of fewer examples than a batch is no reason to plan for fewer
        if tokens is None or length is None or len(shape) < 2 or shape[1] != padded:
            return full
        return (size, tokens, *shape[2:])

    return {name: Described(dtype, long(name, shape)) for name, (dtype, shape) in shapes.items()}


def first_rows(batch: Shapes, number: int) -> Shapes:
    """A batch of so many examples at most."""
    return {name: Described(dtype, (min(shape[0], number), *shape[1:])) for name, (dtype, shape) in batch.items()}


def taken(model: Any, batch: Shapes) -> Shapes:
    """Of a batch, what the model takes, as the Trainer leaves out all else."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = set(inspect.signature(base.forward).parameters) | set(LABELS)
    return {name: tensor for name, tensor in batch.items() if name in known}


def made(batch: Shapes) -> dict[str, Tensor]:
    """Tensors of these shapes, without values."""
    return {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in batch.items()}
