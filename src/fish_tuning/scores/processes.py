"""Scoring by several processes: each takes its share of the examples, and the sums are added up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fish_tuning.errors import FisherError, OthersOutOfMemory, ran_out_of_memory
from fish_tuning.scores.batches import Batch, batch_size, changed, kept
from fish_tuning.scores.loader_parts import Order, is_sharded, order_of_parts, sends_out, shares_of, without_repeats
from fish_tuning.scores.totals import Totals


class Processes:
    """This process and the others of the default group; alone where there is none, or where it is not to be used.

    A loader that every process has whole is shared out batch by batch; one that gives each process a part of its own
    (accelerate's, or one with a DistributedSampler) is taken as it is. Where nothing in a loader tells that it does,
    `split` says so: "already".
    """

    def __init__(self, loader: Any, split: bool | Literal["already"], device: torch.device) -> None:
        together = bool(split) and dist.is_available() and dist.is_initialized()
        self.rank, self.number = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.computes_on = device
        self.device = device if self.number > 1 and dist.get_backend() == "nccl" else torch.device("cpu")
        self.loader = loader
        self.has_own_part = self.number > 1 and (split == "already" or is_sharded(loader))
        # In which the processes' parts make up what one would have; a loader that all have whole comes batch by batch.
        self.order: Order = order_of_parts(loader) if self.has_own_part else "batches"
        self._over = False  # whether all know that one has failed
        self._digest = hashlib.sha1(usedforsecurity=False)

    def examples(self, num_samples: int | None, rows_per_example: int = 1) -> int | None:
        """How many of `num_samples` to take from the loader."""
        if num_samples is None or not self.has_own_part:
            return num_samples
        return shares_of(num_samples, self.loader, self.number, rows_per_example)[self.rank]

    def takes(self, batch_number: int) -> bool:
        """Whether this process scores that batch of its loader."""
        return self.has_own_part or batch_number % self.number == self.rank

    def first_example(self, seen: int, rank: int | None = None) -> int:
        """A number for the next example of this process, or of another, that no other process has.

        Each number has a seed of its own, 2**20 from the next, and torch takes seeds below 2**64.
        """
        apart = min(2**40, 2**43 // self.number)
        return seen + ((self.rank if rank is None else rank) * apart if self.has_own_part else 0)

    def noted(self, num_samples: int | None = None, rows_per_example: int = 1) -> Iterator[Any]:
        """The loader's batches; what they hold is written down, as all processes must get the same.

        `num_samples`: how many examples all processes take.
        """
        batches: Iterable[Any] = without_repeats(self.loader)
        if self.has_own_part and num_samples is not None and sends_out(self.loader):
            # At once: who has its share, or none, must take as many batches as those who do not have theirs yet.
            batches = _first(batches, -(-num_samples // self.number) * rows_per_example)
        return self._written_down(batches)

    def _written_down(self, batches: Iterable[Any]) -> Iterator[Any]:
        for raw in batches:
            if self.number > 1 and not self.has_own_part and isinstance(raw, Mapping):
                for key, value in sorted(raw.items()):
                    if isinstance(value, Tensor):
                        self._digest.update(key.encode())
                        self._digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            yield raw

    def agree(self, error: Exception | None) -> None:
        """Raise the error, on every process: who waits for the others' sums would wait for ever."""
        if self.number > 1 and not self._over:
            told: list[Any] = [None] * self.number
            own = f"{type(error).__name__}: {error}" if error is not None else None
            ran_out = error is not None and ran_out_of_memory(error)
            dist.all_gather_object(told, (own, ran_out, self._digest.hexdigest()))
            failed = [(rank, text, of_memory) for rank, (text, of_memory, _) in enumerate(told) if text is not None]
            self._over = bool(failed)
            if error is None and failed:
                rank, text, of_memory = failed[0]
                kind = OthersOutOfMemory if of_memory else FisherError
                raise kind(f"Process {rank} of {self.number} failed while scoring: {text}")
            if not failed and len({digest for *_, digest in told}) > 1:
                self._over = True
                raise FisherError(
                    f"The calibration dataloaders of the {self.number} processes give different batches, so they "
                    "cannot be shared out. Seed their shuffling alike, give each process a part of its own "
                    "(accelerate's prepare, a DistributedSampler; split_between_processes='already' where nothing in "
                    "the loader tells that it gives a part), or let each score alone: split_between_processes=False."
                )
        if error is not None:
            raise error

    def told(self, own: Any) -> list[Any]:
        """What each process has to tell, in their order."""
        told: list[Any] = [own]
        if self.number > 1:
            told *= self.number
            dist.all_gather_object(told, own)
        return told

    def everyones(self, own: list[Batch]) -> Iterator[tuple[int, Batch]]:
        """Each process's number and batch; of a loader that all have whole, the batches one after another."""
        if not self.has_own_part:
            yield from enumerate(own)
            return
        told = self.told([{key: value.cpu() for key, value in batch.items()} for batch in own])
        for owner, theirs in enumerate(told):
            for batch in own if owner == self.rank else theirs:
                yield owner, changed(batch, lambda key, value: value.to(self.computes_on))

    def leave(self) -> None:
        """Tell the others nothing any more: they are where they cannot be told."""
        self._over = True

    def add_up(self, totals: Totals, seen: int, *, by_all: bool = False) -> int:
        """Sums over all processes in the place of each one's own; returns how many examples they are of.

        `by_all`: whether each has counted the examples of all.
        """
        if self.number == 1:
            return seen
        for total in (*totals.squares.values(), *(totals.gradients or {}).values()):
            exact = total.to(self.device, torch.promote_types(total.dtype, torch.float32))
            dist.all_reduce(exact)
            total.copy_(exact)
        if by_all or not self.has_own_part:
            return seen
        examples = torch.tensor(seen, device=self.device)
        dist.all_reduce(examples)
        return int(examples)


def _first(batches: Iterable[Any], rows: int) -> list[Any]:
    """The first batches, until they have so many rows; copies, since a loader may fill the same tensors again."""
    taken: list[Any] = []
    for raw in batches:
        tensors = {key: value for key, value in raw.items() if isinstance(value, Tensor)}
        taken.append({**raw, **kept(tensors)})
        rows -= batch_size(tensors)
        if rows <= 0:
            break
    return taken
