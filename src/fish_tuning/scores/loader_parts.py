"""Loaders that give each process a part of its own: which they are, without what they give twice, and how much it is.

So that all processes have as many, the parts are filled up with examples of others. In training that hardly matters;
scores would count these twice.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.data_loader import (  # type: ignore[import-untyped]
    BatchSamplerShard,
    DataLoaderDispatcher,
    DataLoaderShard,
    IterableDatasetShard,
)
from accelerate.utils import find_batch_size, slice_tensors  # type: ignore[import-untyped]
from torch.utils.data import BatchSampler
from torch.utils.data.distributed import DistributedSampler

# How the parts of several processes make up the whole: row by row in turn, batch by batch, or one behind another.
Order = Literal["rows", "batches", "parts"]


def is_sharded(loader: Any) -> bool:
    """Whether it gives this process a part of its own."""
    kinds = (DistributedSampler, BatchSamplerShard, IterableDatasetShard)
    return sends_out(loader) or _splits_a_stream(loader) or any(isinstance(part, kinds) for part in _inside(loader))


def sends_out(loader: Any) -> bool:
    """Whether one process reads all and sends the others their parts, so that all must take as many batches."""
    return isinstance(loader, DataLoaderDispatcher)


def order_of_parts(loader: Any) -> Order:
    """How its parts make up the whole that one process would have."""
    parts = _inside(loader)
    if any(map(_takes_turns, parts)):
        return "rows"
    # What is not known to take turns (shards of a stream, a loader's own way) is a piece of the whole.
    known = sends_out(loader) or any(isinstance(part, BatchSamplerShard | IterableDatasetShard) for part in parts)
    return "batches" if known else "parts"


def without_repeats(loader: Any) -> Iterator[Any]:
    """The loader's batches, without the examples that another process has too; those of any loader."""
    with ExitStack() as stack:
        for part in _inside(loader):
            if isinstance(part, BatchSamplerShard):
                stack.enter_context(_set(part, even_batches=False))
            elif _fills_up(part):
                left = range(part.rank, len(part.dataset), part.num_replicas)
                stack.enter_context(_set(part, total_size=len(part.dataset), num_samples=len(left)))
            elif type(part) is IterableDatasetShard:
                stack.enter_context(_set(part, __class__=_UnfilledShard))
        for raw in loader:
            last = sends_out(loader) and loader.end_of_dataloader
            own = _own_rows(raw, loader.remainder, loader.state.process_index) if last else raw
            if own is not None:
                yield own


def shares_of(wanted: int, loader: Any, number: int, rows_per_example: int = 1) -> list[int]:
    """How many of the `wanted` examples each process takes: as many, but for those whose parts have fewer.

    Of a stream that accelerate splits, those of the first `wanted` that are its own.
    """
    sizes = _sizes(loader, wanted * rows_per_example, number)
    room = [size // rows_per_example for size in sizes] if sizes else [wanted] * number
    if sum(room) < wanted:  # a collator may make more rows of what is read than that, so it may be there all the same
        room = [wanted] * number
    shares = [0] * number
    while left := wanted - sum(shares):
        open_ones = [rank for rank in range(number) if shares[rank] < room[rank]]
        each, rest = divmod(left, len(open_ones))
        for place, rank in enumerate(open_ones):
            shares[rank] = min(shares[rank] + each + (place < rest), room[rank])
    return shares


def _inside(loader: Any) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    own = [getattr(loader, name, None) for name in ("sampler", "dataset")]
    found = [*own, batch_sampler, getattr(batch_sampler, "sampler", None)]
    return list({id(part): part for part in found if part is not None}.values())


def _splits_a_stream(loader: Any) -> bool:
    """Whether a stream of `datasets` gives a part: by `split_dataset_by_node`, or as accelerate had it shard itself.

    Of the latter nothing is left in the data set; what accelerate prepares for several processes is always a part.
    """
    stream = getattr(loader, "dataset", None)
    if not isinstance(stream, _streams()):
        return False
    split = getattr(stream, "_distributed", None)
    if split is not None and split.world_size > 1:
        return True
    return isinstance(loader, DataLoaderShard) and PartialState().num_processes > 1


def _streams() -> tuple[type, ...]:
    """The class of streams of `datasets`, if that has been imported."""
    found = getattr(sys.modules.get("datasets"), "IterableDataset", None)
    return () if found is None else (found,)


def _takes_turns(part: Any) -> bool:
    """Whether every so many-th row of the whole is this process's."""
    split = getattr(part, "_distributed", None) if isinstance(part, _streams()) else None
    if split is not None:  # as `datasets` decides it: by shards where these go round
        strategy = getattr(split, "strategy", "auto")
        return strategy == "examples" or (strategy == "auto" and part._ex_iterable.num_shards % split.world_size > 0)
    return _is_plain_sampler(part)


def _is_plain_sampler(part: Any) -> bool:
    return isinstance(part, DistributedSampler) and type(part).__iter__ is DistributedSampler.__iter__


def _fills_up(part: Any) -> bool:
    return _is_plain_sampler(part) and part.total_size > len(part.dataset)


def _sizes(loader: Any, wanted: int, number: int) -> Sequence[int]:
    """How many each part has, where that is known and decides anything."""
    for part in _inside(loader):
        if _fills_up(part) and part.num_replicas == number:
            return [len(range(rank, len(part.dataset), number)) for rank in range(number)]
        if type(part) is IterableDatasetShard and part.num_processes == number:
            # Of the first so many, as nobody knows how many there are: if not all are there, these are.
            each = part.batch_size // number if part.split_batches else part.batch_size
            blocks, rest = divmod(wanted, each * number)
            return [blocks * each + min(max(rest - rank * each, 0), each) for rank in range(number)]
        inner = getattr(part, "batch_sampler", None)
        if isinstance(part, BatchSamplerShard) and type(inner) is BatchSampler and part.num_processes == number:
            try:
                total = len(inner.sampler)  # type: ignore[arg-type]
            except TypeError:
                return ()
            if wanted <= total // (number * inner.batch_size) * number * inner.batch_size:
                return ()  # so many are there in equal parts
            batches = BatchSampler(range(total), inner.batch_size, inner.drop_last)
            shards = (
                BatchSamplerShard(batches, number, rank, part.split_batches, even_batches=False)
                for rank in range(number)
            )
            return [sum(map(len, shard)) for shard in shards]
    return ()


def _own_rows(raw: Any, remainder: int, rank: int) -> Any:
    """Of the last batch that was sent out, without what was filled up; None where that is all. `remainder`: of all."""
    size = find_batch_size(raw)
    keep = min(max(remainder - rank * size, 0), size) if remainder >= 0 else size
    return slice_tensors(raw, slice(0, keep)) if keep else None


class _UnfilledShard(IterableDatasetShard):  # type: ignore[misc]
    """Ends where the data end."""

    def __iter__(self) -> Iterator[Any]:
        generator = getattr(self.dataset, "generator", None)
        if not hasattr(self.dataset, "set_epoch") and isinstance(generator, torch.Generator):
            generator.manual_seed(self.epoch)  # as accelerate does
        number = self.num_processes
        each = self.batch_size // number if self.split_batches else self.batch_size
        block: list[Any] = []
        for element in self.dataset:
            block.append(element)
            if len(block) == each * number:
                yield from block[self.process_index * each :][:each]
                block = []
        if not self.drop_last:
            yield from block[self.process_index * each :][:each]


@contextmanager
def _set(part: Any, **values: Any) -> Iterator[None]:
    """Attributes, for as long as it lasts."""
    before = {name: getattr(part, name) for name in values}
    try:
        for name, value in values.items():
            setattr(part, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(part, name, value)
