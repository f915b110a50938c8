"""What is told of training data, of whatever loader a Trainer has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset

from fish_tuning.training.card_facts import data_rows


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield 1


class Unknown(Stream):
    def __len__(self) -> int:
        raise NotImplementedError


@pytest.mark.parametrize("loader", [None, [{"x": 1}], DataLoader(Stream()), DataLoader(Unknown())])
def test_what_has_no_length_stops_no_training(loader: Any) -> None:
    assert data_rows(loader) == {}


def test_examples_are_counted() -> None:
    assert data_rows(DataLoader([0] * 1_234, batch_size=8)) == {"training data": "1,234 examples"}  # type: ignore[arg-type]
