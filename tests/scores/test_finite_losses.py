"""Losses that are not finite: noted beside the batches, told by the example's name before scores are returned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from device import DEVICE
from tiny import Batch, assert_same_tensors, bert, classification_batch, lora, rebatch, tensors
from torch import Tensor

from fish_tuning import FisherError, calculate_fisher_information, start_along_gradient
from fish_tuning.scores.loss_vectors import UNREAD


def scaled(outputs: Any, batch: Any) -> Tensor:
    return outputs.logits.float().square().sum(-1) * batch["scale"]


def batch_with_a_nan(example: int) -> Batch:
    scale = torch.ones(4, device=DEVICE)
    scale[example] = torch.nan
    return classification_batch() | {"scale": scale}


def test_warm_up_tells_of_the_weights_as_they_were() -> None:
    model = lora(bert(), init_lora_weights=True)
    before = tensors(model)
    with pytest.raises(FisherError, match=r"example 2 is not finite.*All of the model's own tensors are finite"):
        calculate_fisher_information(
            model, rebatch(batch_with_a_nan(2), 2), loss_fn=scaled, warmup_steps=4, progress=False
        )
    assert_same_tensors(tensors(model), before)


@pytest.mark.parametrize("example", [0, 3])
@pytest.mark.parametrize("method", ["auto", "loop"])
def test_the_example_is_named_whatever_the_way(example: int, method: Any) -> None:
    with pytest.raises(FisherError, match=f"example {4 + example} is not finite"):
        calculate_fisher_information(
            lora(bert()),
            [batch_with_a_nan(0) | {"scale": torch.ones(4, device=DEVICE)}, batch_with_a_nan(example)],
            loss_fn=scaled,
            method=method,
            progress=False,
        )


def test_a_long_pass_ends_soon_after() -> None:
    given = 0

    def loader() -> Iterator[Batch]:
        nonlocal given
        for number in range(4 * UNREAD):
            given += 1
            yield rebatch(batch_with_a_nan(0) if number == 1 else batch_with_a_nan(3), 1)[0]

    with pytest.raises(FisherError, match="example 1 is not finite"):
        calculate_fisher_information(lora(bert()), loader(), loss_fn=scaled, method="loop", progress=False)
    assert given <= UNREAD + 1


def test_no_start_is_made_of_it() -> None:
    model = lora(bert(), init_lora_weights=True)
    before = tensors(model)
    with pytest.raises(FisherError, match="example 1 is not finite"):
        start_along_gradient(model, rebatch(batch_with_a_nan(1), 2), loss_fn=scaled, progress=False)
    assert_same_tensors(tensors(model), before)
