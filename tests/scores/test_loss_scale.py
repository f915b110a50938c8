from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tiny import assert_scores_close, bert, classification_batch, lora, rebatch
from torch import Tensor

from fish_tuning import FisherError, calculate_fisher_information, measure_moments
from fish_tuning.scores.loss_scale import FIRST, LossScale, Overflow


def test_gradients_come_back_to_the_bit() -> None:
    scale, gradient = LossScale(fp16=True), torch.randn(5)
    assert torch.equal(scale.unscaled(gradient * scale.value), gradient)
    scale.check()
    plain = LossScale(fp16=False)
    assert plain.value == 1
    assert plain.unscaled(gradient) is gradient


def test_what_is_not_finite_is_told_once_until_nothing_is_scaled() -> None:
    scale = LossScale(fp16=True)
    scale.unscaled(torch.tensor([1.0, torch.inf]))
    with pytest.raises(Overflow):
        scale.check()
    scale.check()
    for _ in range(10):
        scale.lower()
    assert scale.value == 1
    scale.unscaled(torch.tensor([torch.nan]))
    scale.check()


@pytest.mark.parametrize("method", ["auto", "loop"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("factor", [1e-6, 1.0, 300.0])
def test_scores_of_fp16_weights_are_those_of_fp32(factor: float, size: int, method: Any) -> None:
    """At 1e-6 nearly all gradients would be zero; at 300 some overflow at the first scale."""

    def loss_fn(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return factor * torch.nn.functional.cross_entropy(outputs.logits.float(), batch["labels"], reduction="none")

    model, batch = lora(bert()).half(), classification_batch((5, 9, 3, 7))
    options: dict[str, Any] = {"loss_fn": loss_fn, "method": method, "warmup_steps": 0, "progress": False}
    found = measure_moments(model, rebatch(batch, size), **options)
    exact = measure_moments(model.float(), rebatch(batch, size), **options)
    assert_scores_close(found.mean_squares, exact.mean_squares, tolerance=0.05)
    assert_scores_close(found.mean_gradients, exact.mean_gradients, tolerance=0.05)


def test_a_loss_that_overflows_at_every_scale_is_told() -> None:
    def loss_fn(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return 1e6 * FIRST * outputs.logits.float().sum(1)

    model = lora(bert()).half()
    with pytest.raises(FisherError, match="not finite"):
        calculate_fisher_information(model, [classification_batch()], loss_fn=loss_fn, progress=False, warmup_steps=0)
