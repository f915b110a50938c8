"""What batches hold for the model, but not as tensors, is told once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fish_tuning import FishTuningWarning, calculate_fisher_information
from fish_tuning.scores.left_out import LeftOut


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: float = 1.0, mask: Any = None, use_cache: bool = True) -> Tensor:
        return self.layer(x) * scale  # type: ignore[no-any-return]


class TakesAll(Scales):
    def forward(self, x: Tensor, **others: Any) -> Tensor:  # type: ignore[override]
        return super().forward(-x if others.get("task") == "b" else x, others.get("scale", 1.0))


class OfTransformers(TakesAll):
    main_input_name = "x"


def scored(kind: type[Scales] = Scales, **fields: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, batch = kind(), {"x": torch.randn(4, 4), "labels": torch.arange(4) % 3} | fields
    return calculate_fisher_information(
        model,
        [batch, batch],
        loss_fn=lambda outputs, batch: nn.functional.cross_entropy(outputs, batch["labels"], reduction="none"),
        progress=False,
    )


def test_what_the_model_takes_is_told_once() -> None:
    with pytest.warns(FishTuningWarning) as told:
        found = scored(scale=3.0, mask=[1, 2])
    assert len(told) == 1
    assert told[0].filename == __file__
    assert "hold 'scale' (float), 'mask' (list), which" in str(told[0].message)
    assert torch.equal(found["layer.weight"], scored()["layer.weight"])


def test_what_goes_to_other_arguments_is_told() -> None:
    with pytest.warns(
        FishTuningWarning, match=r"hold 'task' \(str\), 'ids' \(list\), which .* leave out of the batches"
    ):
        scored(TakesAll, task="b", ids=[1, 2, 3, 4], mask=None, use_cache=False, scale=torch.tensor(2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        scored(OfTransformers, task="b")  # not one of transformers' own options


@pytest.mark.parametrize(
    "fields",
    [
        {"text": ["a", "b", "c", "d"], "document": 3},  # that no one takes
        {"scale": 1.0, "mask": None},  # as it is without
        {"use_cache": False},
        {"scale": torch.tensor(3.0)},  # the way out
    ],
)
def test_what_changes_nothing_is_not(fields: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        found = scored(**fields)
    same = torch.equal(found["layer.weight"], scored()["layer.weight"])
    assert same == (not isinstance(fields.get("scale"), Tensor))


def test_later_batches_may_hold_more() -> None:
    left_out = LeftOut(Scales())
    assert list(left_out.noted([{"scale": 2.0}, [1]])) == [{"scale": 2.0}, [1]]
    assert len(left_out.new()) == 1
    list(left_out.noted([{"scale": 2.0}, {"mask": "all"}]))
    assert "hold 'mask' (str), which" in left_out.new()[0]
    assert not left_out.new()
