"""Gradients of single examples: what autograd gives is read, and left as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import assert_scores_close
from torch import Tensor, nn

from fish_tuning import calculate_fisher_information


class AddedTables(nn.Module):
    """Two tables that are added to the same states: autograd gives both gradients the same memory."""

    loss_type = "ForSequenceClassification"

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(3, width), nn.Linear(width, 3)
        self.positions, self.segments = (nn.Parameter(torch.randn(5, width)) for _ in range(2))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        states = self.first(x) + self.positions.unsqueeze(0) + self.segments.unsqueeze(0)
        return type("Output", (), {"logits": self.head(torch.tanh(states).mean(1))})()


def by_hand(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    scores = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for x, label in zip(batch["x"], batch["labels"], strict=True):
        loss = nn.functional.cross_entropy(model(x[None]).logits, label[None])
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            scores[name] += gradient.square() / len(batch["x"])
    return scores


def test_gradients_in_one_memory_are_each_squared_once() -> None:
    model = AddedTables()
    batch = {"x": torch.randn(4, 5, 3), "labels": torch.arange(4) % 3}
    rows = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(4)]
    for loader, how in (([batch], "loop"), ([batch], "auto"), (rows, "auto")):
        scores = calculate_fisher_information(model, loader, progress=False, method=how)  # type: ignore[arg-type]
        assert_scores_close(scores, by_hand(model, batch))


def test_nothing_is_written_into_what_the_backward_pass_still_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fish_tuning.scores.totals.CHUNK_ENTRIES", 1)  # each tensor is added within the pass
    test_gradients_in_one_memory_are_each_squared_once()
