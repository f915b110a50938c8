"""Outer products of small layers, made together: hundreds of them take longer to ask for, one by one, than to make."""

from __future__ import annotations

from threading import RLock
from typing import NamedTuple

import torch
from torch import Tensor

from fish_tuning.scores.example_gradients import CHUNK_ENTRIES, OuterProducts
from fish_tuning.scores.totals import Totals

# Entries of what a layer saw and of its output's gradient, up to which a copy of them costs less than operations of
# their own; and of all that waits, which is held longer and copied (fp32: 2 and 16 MiB): the peak is to stay that of a
# plain pass.
_SMALL, _SMALL_ON_GPU = 2**15, 2**20
_WAITING, _WAITING_ON_GPU = 2**19, 2**22

_Kind = tuple[torch.Size, torch.Size, torch.dtype, torch.device]


class _Waiting(NamedTuple):
    name: str
    products: OuterProducts
    version: int  # of the output's gradient, which what comes later in the backward pass may have too

    @property
    def is_there(self) -> bool:
        return self.products.g._version == self.version


class SmallProducts:
    """What waits to be added to the totals of a backward pass."""

    def __init__(self) -> None:
        self._waiting: dict[_Kind, list[_Waiting]] = {}
        self._entries = self._made = 0
        # Autograd has a thread for each device, and a model's layers may be on several.
        self._lock = RLock()
        self.changed: list[str] = []  # the tensors that nothing was added for, since a gradient was written into

    def take(self, into: Totals, name: str, products: OuterProducts) -> bool:
        """Whether they are small, as gradients of the tensor `name`; then `flush` adds them at the latest."""
        g, x = products.g, products.x
        (examples, positions, height), width = g.shape, x.shape[2]
        gpu, entries, made = g.device.type != "cpu", g.numel() + x.numel(), examples * height * width
        if entries > (_SMALL_ON_GPU if gpu else _SMALL) or positions == 1 or products.are_large:
            return False
        if made > CHUNK_ENTRIES or into.squares[name].shape != (height, width):
            return False
        with self._lock:
            if self._entries + entries > (_WAITING_ON_GPU if gpu else _WAITING) or self._made + made > CHUNK_ENTRIES:
                self.flush(into)
            self._entries += entries
            self._made += made
            alike = self._waiting.setdefault((g.shape, x.shape, products.dtype, g.device), [])
            alike.append(_Waiting(name, products, g._version))
        return True

    def flush(self, into: Totals) -> None:
        """Add what waits."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
            self._entries = self._made = 0
            for alike in waiting.values():
                self.changed += [each.name for each in alike if not each.is_there]
                left = [each for each in alike if each.is_there]
                if left:
                    squares, sums = _of_all([each.products for each in left], signed=into.gradients is not None)
                    into.add_all([each.name for each in left], squares, sums)


def _of_all(alike: list[OuterProducts], signed: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Each one's squares, and where it is `signed` each one's sum."""
    if len(alike) == 1:
        return [alike[0].squares()], [alike[0].sum()] if signed else []
    number, dtype = len(alike), alike[0].dtype
    g, x = (torch.cat(parts) for parts in ([each.g for each in alike], [each.x for each in alike]))
    products = torch.bmm(g.to(dtype).transpose(1, 2), x.to(dtype)).float().square_()
    squares = list(products.unflatten(0, (number, -1)).sum(1))
    if not signed:
        return squares, []
    g, x = (side.view(number, -1, side.shape[-1]) for side in (g, x))
    return squares, list(torch.bmm(g.transpose(1, 2), x))
