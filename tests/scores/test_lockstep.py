"""Rounds of batches that several processes score at the same time; test_sharded_models.py has whole models."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fish_tuning.scores.batches import calibration_batches
from fish_tuning.scores.lockstep import rounds
from fish_tuning.scores.processes import Processes


class Two(Processes):
    """As the first of two processes that have a loader whole."""

    def __init__(self) -> None:
        super().__init__([], False, torch.device("cpu"))
        self.number = 2

    def agree(self, error: Exception | None) -> None:
        assert error is None


def refilled() -> Iterator[dict[str, Tensor]]:
    labels = torch.zeros(2)
    for number in range(3):
        yield {"labels": labels.fill_(number)}


def test_each_process_has_a_batch_of_its_own_of_a_loader_that_fills_the_same_tensors_again() -> None:
    found = [
        [(share.owner, share.first_example, share.batch["labels"].tolist()) for share in shares]
        for shares in rounds(Two(), calibration_batches(refilled(), torch.device("cpu"), None))
    ]
    assert found == [[(0, 0, [0, 0]), (1, 2, [1, 1])], [(0, 4, [2, 2])]]
