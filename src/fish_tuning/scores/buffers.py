"""Buffers that forward passes change though the model is in evaluation mode: counters, statistics, frequencies."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fish_tuning.model_walks import every_module

logger = logging.getLogger("fish_tuning.scores.fisher")

# Bytes of buffers that are copied, the small ones first: packed weights are buffers too, and hardly ever written to.
COPIED = 2**26
_NOTES = (bool, int, float, str, type(None), Tensor)  # what modules write down beside a buffer that they replace


class _Buffer(NamedTuple):
    module: nn.Module
    name: str
    tensor: Tensor
    version: int


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """At the end buffers are as they were: those that were written to, and those with others of their kind in place.

    What a module has made longer, packed, moved or registered anew stays, since others may go by it. The log warns of
    those that were written to and are too large to have been copied.
    """
    found = [
        _Buffer(module, name, tensor, tensor._version)
        for module in every_module(model)
        if module._buffers and not isinstance(module, torch.jit.ScriptModule)
        for name, tensor in module._buffers.items()
        if tensor is not None and _is_plain(tensor)
    ]
    notes = {buffer.module: dict(vars(buffer.module)) for buffer in found}
    copies: dict[int, tuple[Tensor, Tensor]] = {}
    left = COPIED
    for buffer in sorted(found, key=lambda each: each.tensor.nbytes):
        left -= buffer.tensor.nbytes
        if left < 0:
            break
        if id(buffer.tensor) not in copies:
            copies[id(buffer.tensor)] = buffer.tensor, buffer.tensor.detach().clone()
    try:
        yield
    finally:
        for module, name, before, _ in found:
            now = module._buffers.get(name)
            if now is not None and now is not before and _is_plain(now) and _alike(now, before):
                module._buffers[name] = before
                _put_back(module, notes[module])
        for tensor, copy in copies.values():
            if _alike(tensor, copy):
                # Not by the tensor itself, whose version tells graphs of the user's that it was written to. (Nor do
                # versions tell what has changed: batch normalization writes its statistics past them.)
                tensor.data.copy_(copy)
    lost = [each.name for each in found if id(each.tensor) not in copies and each.tensor._version != each.version]
    if lost:
        logger.warning(
            "Fisher information: forward passes write into %d buffers that are too large to be copied, e.g. %r, and "
            "they stay changed. Score a model that is loaded for this alone.",
            len(lost),
            lost[0],
        )


def _is_plain(tensor: Tensor) -> bool:
    """With values of its own that can be copied and written to."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_quantized or tensor.is_inference())
        and not any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
        and tensor.untyped_storage().nbytes() >= tensor.nbytes  # an engine may have given it up
    )


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _put_back(module: nn.Module, notes: dict[str, Any]) -> None:
    """What the module has as plain attributes: of which length its frequencies are, say."""
    own = vars(module)
    for name in own.keys() & notes.keys():
        if isinstance(own[name], _NOTES) and isinstance(notes[name], _NOTES):
            own[name] = notes[name]
