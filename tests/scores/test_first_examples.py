"""The first examples of several processes, in the order of one; test_processes.py has whole scores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fish_tuning.scores.first_examples import first_batches, first_rounds, places
from fish_tuning.scores.loader_parts import Order
from fish_tuning.scores.lockstep import Share


def refilled(sizes: tuple[int, ...]) -> Iterator[dict[str, Tensor]]:
    labels = torch.zeros(max(sizes))
    for number, size in enumerate(sizes):
        yield {"labels": labels[:size].fill_(number)}


def share(size: int, owner: int) -> Share:
    return Share({"labels": torch.zeros(size)}, 0, owner)


@pytest.mark.parametrize(("examples", "taken"), [(0, []), (1, [2]), (3, [2, 2]), (4, [2, 2]), (9, [2, 2, 1])])
def test_no_more_is_taken_than_is_needed(examples: int, taken: list[int]) -> None:
    batches = refilled((2, 2, 1))
    first = first_batches(batches, examples)
    assert [len(batch["labels"]) for batch in first] == taken
    assert [float(batch["labels"][0]) for batch in first] == [*range(len(taken))], "a loader fills them again"
    assert len(list(batches)) == 3 - len(taken)


def test_rounds_are_taken_until_all_processes_together_have_enough() -> None:
    left = ([Share(batch, 0, 0)] for batch in refilled((2, 2, 2)))
    assert [float(shares[0].batch["labels"][0]) for shares in first_rounds(left, 3)] == [0, 1]
    assert len(list(left)) == 1
    assert first_rounds(left, 3) == []


@pytest.mark.parametrize(
    ("order", "found"),
    [
        ("rows", [[0, 2], [1, 3], [4, 6], [5]]),
        ("batches", [[0, 1], [2, 3], [4, 5], [6]]),
        ("parts", [[0, 1], [4, 5], [2, 3], [6]]),
    ],
)
def test_rows_have_the_places_that_one_process_gives_them(order: Order, found: list[list[int]]) -> None:
    assert places([share(2, 0), share(2, 1), share(2, 0), share(1, 1)], order) == found


def test_no_place_is_left_free_where_one_process_has_less() -> None:
    assert places([share(1, 0), share(3, 1)], "rows") == [[0], [1, 2, 3]]
    assert places([], "rows") == []
