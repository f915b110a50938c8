"""Outer products that are made together are those that are made one by one."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from device import DEVICE, placed
from tiny import assert_scores_close, bert, classification_batch, lora, rebatch
from torch import Tensor, nn

from fish_tuning import Moments, calculate_fisher_information, measure_moments
from fish_tuning.scores import small_products
from fish_tuning.scores.example_gradients import OuterProducts
from fish_tuning.scores.small_products import SmallProducts
from fish_tuning.scores.totals import Totals

SHAPES = [(3, 5, 4, 6), (3, 5, 4, 6), (3, 5, 6, 4), (3, 2, 4, 6), (3, 5, 4, 6)]  # n, P, height, width


def products(dtype: torch.dtype = torch.float32) -> dict[str, OuterProducts]:
    torch.manual_seed(0)
    return {
        str(number): OuterProducts(torch.randn(n, p, o).to(DEVICE), torch.randn(n, p, i).to(DEVICE), dtype)
        for number, (n, p, o, i) in enumerate(SHAPES)
    }


def totals(dtype: torch.dtype = torch.float32, signed: bool = True) -> Totals:
    return Totals.zeros({str(k): torch.zeros(o, i) for k, (_, _, o, i) in enumerate(SHAPES)}, dtype, DEVICE, signed)


@pytest.mark.parametrize("limit", ["_WAITING", "CHUNK_ENTRIES", None])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [torch.float32, torch.float64])
def test_sums_are_those_of_one_after_another(
    kept: torch.dtype, computed: torch.dtype, signed: bool, limit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit is not None:
        monkeypatch.setattr(small_products, limit, 150)
        monkeypatch.setattr(small_products, "_WAITING_ON_GPU", 150)
    made, expected, small = totals(kept, signed), totals(kept, signed), SmallProducts()
    for name, each in products(computed).items():
        assert small.take(made, name, each)
        expected.add(name, each.squares(), each.sum)
    small.flush(made)
    assert not small.changed
    for name in expected.squares:
        torch.testing.assert_close(made.squares[name], expected.squares[name], rtol=1e-5, atol=1e-5)
        if signed:
            assert made.gradients is not None
            assert expected.gradients is not None
            torch.testing.assert_close(made.gradients[name], expected.gradients[name], rtol=1e-5, atol=1e-5)
    small.flush(made)  # nothing is left
    torch.testing.assert_close(made.squares, expected.squares, rtol=1e-5, atol=1e-5)


def test_what_is_large_or_of_another_shape_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    small, each = SmallProducts(), products()["0"]
    assert not small.take(totals(), "2", each)
    assert not small.take(totals(), "0", OuterProducts(each.g[:, :1], each.x[:, :1]))
    for name in ("CHUNK_ENTRIES", "_SMALL"):
        with monkeypatch.context() as patch:
            for each_name in (name, f"{name}_ON_GPU"):
                patch.setattr(small_products, each_name, 50, raising=False)
            assert not small.take(totals(), "0", each)
    monkeypatch.setattr("fish_tuning.scores.example_gradients._LARGE", 20)
    monkeypatch.setattr("fish_tuning.scores.example_gradients._LARGE_ON_GPU", 20)
    assert not small.take(totals(), "0", each)


def test_a_gradient_that_is_written_into_meanwhile_is_told() -> None:
    made, small, given = totals(), SmallProducts(), products()
    for name, each in given.items():
        small.take(made, name, each)
    given["1"].g.mul_(2)
    small.flush(made)
    assert small.changed == ["1"]
    assert made.squares["1"].count_nonzero() == 0
    torch.testing.assert_close(made.squares["0"], given["0"].squares())


class InPlace(torch.autograd.Function):
    """Identity that writes into the gradient that it is given, as some kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].mul_(3.0)


class Residual(nn.Module):
    """What the layer gives has the gradient that what it is added to has."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer, self.head, self.in_place = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3), in_place

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        added: Tensor = InPlace.apply(hidden) if self.in_place else hidden  # type: ignore[no-untyped-call]
        return self.head((added + self.layer(hidden)).mean(1))  # type: ignore[no-any-return]


def losses(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(outputs, batch["labels"], reduction="none")


@pytest.mark.parametrize("in_place", [False, True])
def test_who_writes_into_a_gradient_changes_no_score(in_place: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    x, labels = torch.randn(12, 5, 4, device=DEVICE), torch.arange(12, device=DEVICE) % 3
    batches, model = rebatch({"x": x, "labels": labels}, 4), placed(Residual(in_place))
    options: dict[str, Any] = {"loss_fn": losses, "progress": False, "warmup_steps": 0}
    exact = calculate_fisher_information(model, batches, method="loop", **options)
    assert_scores_close(calculate_fisher_information(model, batches, **options), exact)
    assert ("layer.weight: its output's gradient is changed in place" in caplog.text) is in_place


def test_scores_are_those_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> Moments:
        batches = rebatch(classification_batch((5, 9, 3, 7, 9, 4)), 2)
        return measure_moments(lora(bert()), batches, warmup_steps=0, progress=False)

    together, taken = found(), []
    monkeypatch.setattr(SmallProducts, "take", lambda *_: bool(taken.append(True)))
    alone = found()
    assert taken
    assert_scores_close(together.mean_squares, alone.mean_squares)
    assert_scores_close(together.mean_gradients, alone.mean_gradients)
