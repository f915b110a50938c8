"""Sums of gradients and of their squares: added in one go they are what they are one by one, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fish_tuning.scores import totals
from fish_tuning.scores.totals import Together, Totals

SHAPES = {"a": (3, 4), "b": (5,), "table": (6, 2)}


def gradients(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    made = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    rows = torch.tensor([[1, 4]])
    return made | {"table": torch.sparse_coo_tensor(rows, torch.randn(2, 2), SHAPES["table"]).coalesce()}


def zeros(dtype: torch.dtype, signed: bool) -> Totals:
    return Totals.zeros({name: torch.zeros(shape) for name, shape in SHAPES.items()}, dtype, None, signed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("held", [0, 13, 10**6])
def test_together_is_one_by_one(held: int, signed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many entries wait, and with several losses of an example."""
    monkeypatch.setattr(totals, "CHUNK_ENTRIES", held)
    one_by_one, at_once = zeros(dtype, signed), zeros(dtype, signed)
    together = Together(at_once)
    for example in range(3):
        for loss in range(2):
            for name, gradient in gradients(2 * example + loss).items():
                one_by_one.add_plain(name, gradient.clone())
                together.take(name, gradient)
        together.flush()
    for name in SHAPES:
        assert torch.equal(one_by_one.squares[name], at_once.squares[name])
        if signed:
            assert one_by_one.gradients is not None
            assert at_once.gradients is not None
            assert torch.equal(one_by_one.gradients[name], at_once.gradients[name])


def test_what_is_ignored_is_not_added() -> None:
    together = Together(Totals({"a": torch.zeros(2)}, ignores=True))
    together.take("a", torch.ones(2))
    together.flush()
    assert not together._totals.squares["a"].any()
