"""Loaders that give each process its part: together the parts hold every example once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, zip_longest
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard  # type: ignore[import-untyped]
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from fish_tuning.scores.first_examples import places
from fish_tuning.scores.loader_parts import is_sharded, order_of_parts, shares_of, without_repeats
from fish_tuning.scores.lockstep import Share


class Stream(IterableDataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))


def by_sampler(size: int, number: int, rank: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(range(size), batch_size=2, sampler=DistributedSampler(range(size), number, rank, **options))  # type: ignore[arg-type]


def by_sampler_in_a_batch_sampler(size: int, number: int, rank: int) -> DataLoader[Any]:
    sampler = DistributedSampler(range(size), number, rank)  # type: ignore[arg-type]
    return DataLoader(range(size), batch_sampler=BatchSampler(sampler, 2, drop_last=False))  # type: ignore[arg-type]


def by_shard(size: int, number: int, rank: int, split: bool = False) -> DataLoader[Any]:
    batches = BatchSampler(range(size), 2 * number if split else 2, drop_last=False)
    return DataLoader(range(size), batch_sampler=BatchSamplerShard(batches, number, rank, split))  # type: ignore[arg-type]


def by_stream(size: int, number: int, rank: int, split: bool = False) -> DataLoader[Any]:
    each = 2 * number if split else 2
    shard = IterableDatasetShard(Stream(size), each, False, number, rank, split)
    return DataLoader(shard, batch_size=2)


LOADERS: dict[str, Callable[[int, int, int], DataLoader[Any]]] = {
    "sampler": by_sampler,
    "sampler in a batch sampler": by_sampler_in_a_batch_sampler,
    "shard": by_shard,
    "split batches": lambda size, number, rank: by_shard(size, number, rank, split=True),
    "stream": by_stream,
    "split stream": lambda size, number, rank: by_stream(size, number, rank, split=True),
}


def given(loader: Any) -> list[int]:
    return [number for batch in without_repeats(loader) for number in batch.tolist()]


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("how", LOADERS)
def test_every_example_comes_once(how: str, number: int) -> None:
    for size in (1, 2, 5, 7, 12):
        loaders = [LOADERS[how](size, number, rank) for rank in range(number)]
        filled_up = [[number for batch in loader for number in batch.tolist()] for loader in loaders]
        parts = [given(loader) for loader in loaders]
        assert all(map(is_sharded, loaders))
        assert sorted(chain.from_iterable(parts)) == list(range(size)), (size, parts)
        for part, filled in zip(parts, filled_up, strict=True):
            assert filled[: len(part)] == part
        again = [[number for batch in loader for number in batch.tolist()] for loader in loaders]
        assert again == filled_up, "the loader is as it was"


@pytest.mark.parametrize("how", LOADERS)
def test_parts_make_up_the_whole_in_its_order(how: str) -> None:
    loaders = [LOADERS[how](11, 3, rank) for rank in range(3)]
    if how.startswith("sampler"):
        for loader in loaders:
            loader.batch_sampler.sampler.shuffle = False  # type: ignore[union-attr]
    parts = [[batch.tolist() for batch in without_repeats(loader)] for loader in loaders]
    shares = [
        Share({"labels": torch.tensor(batch)}, 0, owner)
        for batches in zip_longest(*parts)
        for owner, batch in enumerate(batches)
        if batch
    ]
    found = places(shares, order_of_parts(loaders[0]))
    assert found == [share.batch["labels"].tolist() for share in shares]


def test_what_a_sampler_drops_is_not_scored() -> None:
    assert [len(given(by_sampler(7, 3, rank, drop_last=True))) for rank in range(3)] == [2, 2, 2]


def test_a_sampler_with_an_order_of_its_own_is_left_alone() -> None:
    class Own(DistributedSampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter([0, 0, 1])

    loader = DataLoader(range(5), sampler=Own(range(5), 2, 0))  # type: ignore[arg-type]
    assert given(loader) == [0, 0, 1]


@pytest.mark.parametrize(
    ("loader", "wanted", "number", "shares"),
    [
        (by_sampler(5, 2, 0), 5, 2, [3, 2]),
        (by_sampler(5, 2, 0), 3, 2, [2, 1]),
        (by_sampler(7, 3, 0), 6, 3, [2, 2, 2]),
        (by_shard(5, 2, 0), 5, 2, [3, 2]),  # parts of three and two
        (by_shard(3, 2, 0), 3, 2, [2, 1]),
        (by_shard(9, 3, 0), 9, 3, [4, 3, 2]),  # of four, three and two: 4 + 2, 2 + 1, 2
        (by_stream(5, 2, 0), 5, 2, [3, 2]),  # nobody knows how many there are: of the first five
        (by_stream(3, 2, 0), 2, 2, [2, 0]),
        (by_stream(3, 2, 0), 9, 2, [5, 4]),
        (by_stream(3, 3, 0, split=True), 7, 3, [3, 2, 2]),
        (by_sampler(5, 2, 0), 9, 2, [5, 4]),  # more than are read: a collator may make more of them
    ],
)
def test_processes_whose_parts_have_more_take_more(
    loader: DataLoader[Any], wanted: int, number: int, shares: list[int]
) -> None:
    assert shares_of(wanted, loader, number) == shares


def test_a_part_with_too_few_is_made_up_for() -> None:
    batches = BatchSampler(range(5), 4, drop_last=False)  # of four and one
    loader = DataLoader(range(5), batch_sampler=BatchSamplerShard(batches, 2, 0))  # type: ignore[arg-type]
    assert shares_of(5, loader, 2) == [4, 1]
    assert shares_of(4, loader, 2) == [3, 1]
    assert shares_of(2, loader, 2) == [1, 1]
    assert shares_of(2, loader, 2, rows_per_example=2) == [2, 0]
    loader.batch_sampler.batch_sampler.sampler = Stream(5)  # type: ignore[union-attr]  # has no length
    assert shares_of(5, loader, 2) == [3, 2]
