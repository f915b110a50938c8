"""Batches stay as they are, whatever models and losses do with what they are given."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import Batch, assert_scores_close
from torch import Tensor, nn
from torch.nn import functional as F

from fish_tuning import calculate_fisher_information
from fish_tuning.scores.loss_vectors import LossVectors


class Normalizes(nn.Module):
    """Changes what it is given: its images, in place or not, and then its labels."""

    loss_type = "ForImageClassification"

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)
        self.in_place = in_place

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        if self.in_place:
            pixel_values.div_(127.5).sub_(1.0)
        else:
            pixel_values = pixel_values / 127.5 - 1.0
        logits = self.head(self.conv(pixel_values).relu().mean((2, 3)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if self.in_place and labels is not None:
            labels.zero_()
        return SimpleNamespace(logits=logits, loss=loss)


def batches() -> list[Batch]:
    return [
        {
            "pixel_values": torch.randint(0, 255, (4, 1, 5, 5), generator=torch.Generator().manual_seed(seed)).float(),
            "labels": torch.tensor([0, 1, 2, 1]),
        }
        for seed in range(2)
    ]


def losses_in_place(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    labels = batch["labels"].add_(1).remainder_(3)
    return F.cross_entropy(outputs.logits, labels, reduction="none")


@pytest.mark.parametrize("options", [{}, {"method": "loop"}, {"warmup_steps": 2}, {"loss_fn": losses_in_place}])
def test_inputs_that_are_changed_in_place(options: dict[str, Any]) -> None:
    given = batches()
    found = calculate_fisher_information(Normalizes(True), given, progress=False, **options)
    assert_scores_close(found, calculate_fisher_information(Normalizes(False), batches(), progress=False, **options))
    assert all(
        torch.equal(value, before[key])
        for batch, before in zip(given, batches(), strict=True)
        for key, value in batch.items()
    )


class Energy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, places: Tensor) -> Tensor:
        return self.outer(self.inner(places).tanh()).sum(1)  # type: ignore[no-any-return]


def loss_of_forces(energy: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    (forces,) = torch.autograd.grad(energy.sum(), batch["places"], create_graph=True)
    return (forces - batch["labels"]).square().sum(1)


@pytest.mark.filterwarnings("ignore::fish_tuning.FishTuningWarning")
@pytest.mark.parametrize("method", ["auto", "loop"])
def test_losses_of_gradients_of_inputs(method: Any) -> None:
    model, places, labels = Energy(), torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    batch = {"places": places, "labels": labels}
    found = calculate_fisher_information(model, [batch], method=method, loss_fn=loss_of_forces, progress=False)
    expected = torch.zeros_like(model.inner.weight)
    for loss in loss_of_forces(model(places), batch):
        expected += torch.autograd.grad(loss, model.inner.weight, retain_graph=True)[0].square() / 4
    torch.testing.assert_close(found["inner.weight"], expected)


class Fails(Normalizes):
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        outputs = super().forward(pixel_values)
        if labels is not None:
            raise ValueError("of labels")
        return outputs


def test_passes_that_look_for_the_reason_of_an_error_have_the_same_inputs() -> None:
    (batch, _) = batches()
    losses = LossVectors(Fails(True), "empirical", "mean", None, 0)
    with pytest.raises(Exception, match="of labels"):
        losses(batch, 0)
    assert torch.equal(batch["pixel_values"], batches()[0]["pixel_values"])
