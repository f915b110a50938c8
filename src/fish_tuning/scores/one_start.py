"""One start for all processes: where each drew its adapter or head by itself, what is scored is the first one's.

That is what DDP trains, and sums over different models would be the scores of none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fish_tuning.scores.processes import Processes
from fish_tuning.scores.reading import read
from fish_tuning.sparse.sharding import engine_of

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_CHUNK = {"cpu": 2**16}  # entries whose bits are widened at a time: what a CPU's cache holds
_CHUNK_ELSEWHERE = 2**20
_FIRST = 1024  # entries of a frozen tensor that are looked at: one that was drawn apart differs there


@contextmanager
def one_start(processes: Processes, trainable: Mapping[str, nn.Parameter]) -> Iterator[list[str]]:
    """The first process's values everywhere, once it is known that all are there; gives the names of what changed here.

    Each process's own values are back in the end. Only tensors that differ are sent.
    """
    processes.agree(None)
    names = _different(processes, trainable)
    before: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for name in names:
                values = trainable[name].detach().to(processes.device).clone(memory_format=torch.contiguous_format)
                dist.broadcast(values, 0)
                if processes.rank:
                    before[name] = trainable[name].detach().clone()
                    trainable[name].copy_(values)
        yield list(before)
    finally:
        with torch.no_grad():
            for name, values in before.items():
                trainable[name].copy_(values)


def different_frozen(processes: Processes, model: nn.Module) -> str | None:
    """The first frozen tensor whose first entries are not those of all processes, of those that each has whole.

    All of them would be a pass over the model's weights.
    """
    if processes.number == 1:
        return None
    frozen = {
        name: parameter.detach().flatten()[:_FIRST]
        for name, parameter in model.named_parameters()
        if not (parameter.requires_grad or parameter.is_meta or engine_of(parameter)) and _is_plain(parameter)
    }
    return next(iter(_different(processes, frozen)), None)


def _is_plain(parameter: Tensor) -> bool:
    """Whether its first entries can be had without all of it: quantized weights may be of classes of their own."""
    return type(parameter.detach()) is Tensor and parameter.is_contiguous() and not parameter.is_complex()


def _different(processes: Processes, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that have not the same bits in all processes, to which it gives the same."""
    if processes.number == 1:
        return []
    sums = dict(zip(tensors, _checksums(tensors.values()), strict=True))
    first, *others = processes.told(sums)
    return [name for name, own in first.items() if any(theirs.get(name, own) != own for theirs in others)]


def _checksums(tensors: Iterable[Tensor]) -> list[int]:
    weights: dict[torch.device, Tensor] = {}
    totals = []
    for tensor in tensors:
        if tensor.device not in weights:
            weights[tensor.device] = _weights(tensor.device)
        totals.append(_checksum(tensor, weights[tensor.device]))
    return [int(total) for total in read(totals)]


def _checksum(tensor: Tensor, weights: Tensor) -> Tensor:
    """Of its bits and their places, made where it is, so that a GPU sends one number."""
    bits = tensor.detach().contiguous().flatten().view(_BITS[tensor.dtype.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in bits.split(len(weights)):
        total = 31 * total + (chunk * weights[: len(chunk)]).sum()
    return total


def _weights(device: torch.device) -> Tensor:
    """As good as random, so that entries that changed places, or signs, do not make up for each other."""
    size = _CHUNK.get(device.type, _CHUNK_ELSEWHERE)
    return torch.randint(2**31, (size,), device="cpu", generator=torch.Generator().manual_seed(0)).to(device)
