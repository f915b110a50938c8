"""What a module is called with beside tensors, where it is done again for each example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Batch, assert_scores_close
from torch import Tensor, nn

from fish_tuning import calculate_fisher_information
from fish_tuning.scores.recomputed_layers import _may_be_by_row

GIVEN: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda lengths: lengths.tolist(),
    "tuple": lambda lengths: tuple(lengths.tolist()),
    "dictionary": lambda lengths: {"of": {"rows": lengths.tolist()}},
    "by number": lambda lengths: dict(enumerate(lengths.tolist())),
    "array": lambda lengths: lengths.numpy(),
    "spans": lambda lengths: [(0, length) for length in lengths.tolist()],
    "tensors": lambda lengths: list(lengths.unbind()),
}


class Pool(nn.Module):
    """Attention over the first tokens of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(6))

    def forward(self, hidden: Tensor, lengths: Any) -> Tensor:
        lengths = lengths["of"]["rows"] if isinstance(lengths, dict) and "of" in lengths else lengths
        pooled = []
        for number, row in enumerate(hidden):
            length = lengths[number][1] if isinstance(lengths[number], tuple) else lengths[number]
            weights = (row[: int(length)] @ self.query).softmax(0)
            pooled.append(weights @ row[: int(length)])
        return torch.stack(pooled)


class Reader(nn.Module):
    loss_type = "ForSequenceClassification"

    def __init__(self, given: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.pool, self.head = nn.Embedding(40, 6), Pool(), nn.Linear(6, 3)
        self.given = given

    def forward(self, input_ids: Tensor) -> object:
        pooled = self.pool(self.words(input_ids), self.given((input_ids != 0).sum(1)))
        return type("Output", (), {"logits": self.head(pooled.tanh())})()


def batch_of(*lengths: int) -> Batch:
    ids = torch.randint(1, 40, (len(lengths), 7), generator=torch.Generator().manual_seed(1))
    ids = ids * (torch.arange(7) < torch.tensor(lengths)[:, None])
    return {"input_ids": ids, "labels": torch.arange(len(lengths)) % 3}


@pytest.mark.filterwarnings("ignore::fish_tuning.FishTuningWarning")
@pytest.mark.parametrize("given", GIVEN)
def test_what_a_list_holds_of_each_example_is_not_taken_for_the_same_for_all(given: str) -> None:
    batches = [batch_of(7, 7, 7), batch_of(7, 3, 5, 2), batch_of(2, 7)]
    for some in (batches, batches[1:]):
        scores = calculate_fisher_information(Reader(GIVEN[given]), some, progress=False)
        by_loop = calculate_fisher_information(Reader(GIVEN[given]), some, method="loop", progress=False)
        assert_scores_close(scores, by_loop)


@pytest.mark.parametrize(
    "value",
    [
        "name", None, 4, 0.5, [1, 2, 3], [7] * 4, (True,) * 4, {"a": 1, "b": 2, "c": 3, "d": 4},
        torch.Size([2, 3, 4, 5]), np.arange(3), np.array(4.0), np.ones((4, 2)),
        [torch.ones(4, 2)] * 4, (torch.ones(1, 2),) * 4, torch.arange(4),
        (torch.ones(2), None, None, None),
    ],
)  # fmt: skip
def test_what_is_the_same_for_all(value: Any) -> None:
    assert not _may_be_by_row(value, {4})


@pytest.mark.parametrize(
    "value",
    [[1, 2, 3, 4], ["a", "b", "a", "b"], range(4), [[1], [], [2], []], np.arange(8).reshape(4, 2), ([0.5] * 3 + [1.0],),
     [torch.ones(3, 2)] * 4, [np.ones(2), np.ones(3)] * 2],
)  # fmt: skip
def test_what_may_be_of_each_example(value: Any) -> None:
    assert _may_be_by_row(value, {4})
