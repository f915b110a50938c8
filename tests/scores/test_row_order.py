"""Rows that data have put in their order are no examples one after another, though they are as many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import assert_scores_close
from torch import Tensor, nn

from fish_tuning import calculate_fisher_information
from fish_tuning.scores.row_order import ordered_by_data
from fish_tuning.scores.scorer import Scorer

IN_ORDER: dict[str, Callable[[Tensor], Tensor]] = {
    "folded": lambda x: x.flatten(0, 1),
    "changed in its place": lambda x: torch.relu(2 * x.reshape(-1, 6) + 1),
    "windows": lambda x: x.view(4, 2, 3, 6).flatten(0, 1),
    "picked before it is folded": lambda x: x[:, torch.tensor([2, 0, 1, 3, 4, 5])].flatten(0, 1),
    "a column of each row": lambda x: x.flatten(0, 1).gather(1, torch.randint(6, (24, 2))),
    "columns in order": lambda x: x.flatten(0, 1).sort(-1).values.index_select(1, torch.tensor([2, 1])),
    "the last of each": lambda x: x[torch.arange(4), torch.tensor([5, 2, 0, 3])],
    "the last of each choice": lambda x: x.view(8, 3, 6)[torch.arange(8), torch.randint(3, (8,))],
    "by a mask": lambda x: x[torch.eye(6)[:4].bool()],
    "of a table": lambda x: x.flatten(0, 1) + nn.Parameter(torch.randn(9, 6))[torch.randint(9, (24,))],
    "no fold": lambda x: x[torch.tensor([1, 0, 2, 3])],
}
BY_DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "picked": lambda x: x.flatten(0, 1)[torch.randperm(24)],
    "selected": lambda x: 2 * x.flatten(0, 1).index_select(0, torch.randperm(24)) + 1,
    "gathered": lambda x: x.flatten(0, 1).gather(0, torch.randperm(24)[:, None].expand(24, 6)),
    "before the last of each choice": lambda x: x.flatten(0, 1)[torch.randperm(24)].view(8, 3, 6)[torch.arange(8), 0],
    "as many as examples": lambda x: x.flatten(0, 1)[torch.tensor([7, 3, 11, 20])].relu(),
    "sorted": lambda x: x.flatten(0, 1).sort(0).values,
    "put": lambda x: torch.zeros(24, 6).index_add(0, torch.randperm(24), x.flatten(0, 1)),
    "behind a layer": lambda x: nn.Linear(6, 6)(x.flatten(0, 1)[torch.randperm(24)]).tanh(),
}


@pytest.mark.parametrize("way", IN_ORDER)
def test_in_order(way: str) -> None:
    assert not ordered_by_data(IN_ORDER[way](torch.randn(4, 6, 6, requires_grad=True).clone()), 4)


@pytest.mark.parametrize("way", BY_DATA)
def test_by_data(way: str) -> None:
    assert ordered_by_data(BY_DATA[way](torch.randn(4, 6, 6, requires_grad=True).clone()), 4)
    assert not ordered_by_data(BY_DATA[way](torch.randn(4, 6, 6)).detach(), 4), "without a gradient there is no graph"


class Routed(nn.Module):
    """Its expert has all tokens, those of the second batch in another order."""

    loss_type = "ForSequenceClassification"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.expert, self.head = nn.Embedding(40, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor) -> object:
        words = self.words(input_ids)
        order = (input_ids.flatten() < 20).long().argsort(stable=True)
        mixed = words.flatten(0, 1)[order]
        back = self.expert(mixed).tanh()[order.argsort()].view_as(words)
        return type("Output", (), {"logits": self.head(back.sum(1))})()


class Expert(Routed):
    """It has one token of the first example and three of the last, as many as there are examples."""

    def forward(self, input_ids: Tensor) -> object:
        words = self.words(input_ids)
        chosen = (input_ids.flatten() >= 30).nonzero()[:, 0]
        mixed = words.flatten(0, 1).index_add(0, chosen, self.expert(words.flatten(0, 1)[chosen]).tanh())
        return type("Output", (), {"logits": self.head(mixed.view_as(words).sum(1))})()


def test_a_number_that_fits_by_chance_is_no_batch(caplog: pytest.LogCaptureFixture) -> None:
    """The example that is looked at alone has its token in its place."""
    model, ids = Expert(), torch.randint(0, 30, (4, 6))
    ids[0, 2] = 35
    ids[3, [0, 1, 5]] = torch.tensor([31, 36, 39])
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 0])}
    with caplog.at_level("INFO", "fish_tuning"):
        scores = calculate_fisher_information(model, [batch], progress=False)
    assert "expert.weight: data decide where an example's rows are" in caplog.text
    assert_scores_close(scores, calculate_fisher_information(model, [batch], method="loop", progress=False))


class AmongOthers(nn.Module):
    """An expert in a list, which is all that trains."""

    loss_type = "ForSequenceClassification"

    def __init__(self, kind: type[Routed]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([kind().requires_grad_(False)])
        self.layers[0].expert.requires_grad_()

    def forward(self, input_ids: Tensor) -> object:
        output: object = self.layers[0](input_ids)
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Routed, Expert])
def test_what_nothing_before_it_trains_is_told_too(
    kind: type[Routed], dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """Its input needs no gradient, so a forward pass with a graph has to tell."""
    model = AmongOthers(kind).to(dtype)
    in_order, mixed = torch.randint(20, 30, (4, 6)), torch.randint(0, 30, (4, 6))
    for row, ids in enumerate((in_order, mixed)):  # as many of an expert's as there are examples, first in their places
        ids[:, 2] = 35 if row == 0 else ids[:, 2]
        ids[0, [0, 1, 3, 5]] = 36 if row == 1 else ids[0, [0, 1, 3, 5]]
    batches = [{"input_ids": ids, "labels": torch.tensor([0, 1, 2, 0])} for ids in (in_order, mixed)]
    with caplog.at_level("INFO", "fish_tuning"):
        scores = calculate_fisher_information(model, batches, progress=False)
    assert "data decide where an example's rows are" in caplog.text
    by_loop = calculate_fisher_information(model, batches, method="loop", progress=False)
    assert_scores_close(scores, by_loop, 1e-5 if dtype == torch.float32 else 0.05)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == list(scores)


def test_a_forward_pass_that_only_tells_leaves_the_next_ones_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what goes through the loop after it (Jamba, Qwen3-Next) would hand its gradients to rules."""
    left, by_data = [], Scorer._by_data

    def noted(self: Scorer, *args: Any) -> list[str]:
        found = by_data(self, *args)
        left.append(self.probes.state.anchor)
        return found

    monkeypatch.setattr(Scorer, "_by_data", noted)
    ids = torch.randint(20, 30, (4, 6))
    ids[:, 2] = 35  # an expert's, one of each example
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 0])}
    calculate_fisher_information(AmongOthers(Expert), [batch], progress=False)
    assert left == [None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_one_batch_proves_holds_for_the_next(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = Routed().to(dtype)
    in_order, mixed = torch.randint(20, 40, (4, 6)), torch.randint(0, 40, (4, 6))
    batches = [{"input_ids": ids, "labels": torch.tensor([0, 1, 2, 0])} for ids in (in_order, mixed)]
    with caplog.at_level("INFO", "fish_tuning"):
        scores = calculate_fisher_information(model, batches, progress=False)
    assert "expert.weight: data decide where an example's rows are" in caplog.text
    by_loop = calculate_fisher_information(model, batches, method="loop", progress=False)
    assert_scores_close(scores, by_loop, 1e-5 if dtype == torch.float32 else 0.05)
