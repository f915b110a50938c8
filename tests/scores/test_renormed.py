"""Scoring leaves tables as they are that embeddings write into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import assert_scores_close
from torch import Tensor, nn

from fish_tuning import calculate_fisher_information


class Bounded(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = kind(9, 4, max_norm=0.5), nn.Linear(4, 3)  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> Tensor:
        read = self.table(x)
        return self.head(read.mean(1) if read.dim() == 3 else read)  # type: ignore[no-any-return]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_tables_with_a_largest_norm_are_as_they_were(kind: type[nn.Module], trained: bool) -> None:
    model = Bounded(kind)
    table: Any = model.get_parameter("table.weight").requires_grad_(trained)
    before = table.detach().clone()
    batch = {"x": torch.arange(12).view(4, 3) % 9, "labels": torch.arange(4) % 3}

    def scores(method: Any, **options: Any) -> dict[str, Tensor]:
        found = calculate_fisher_information(
            model,
            [batch],
            method=method,
            loss_fn=lambda outputs, batch: nn.functional.cross_entropy(outputs, batch["labels"], reduction="none"),
            progress=False,
            **options,
        )
        assert torch.equal(table, before)
        return found

    assert_scores_close(scores("auto"), scores("loop"))
    scores("auto", warmup_steps=1)
