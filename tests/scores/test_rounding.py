"""Sums in bfloat16 are right on average, however many small parts they have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fish_tuning import calculate_fisher_information
from fish_tuning.scores import rounding
from fish_tuning.scores.rounding import Rounding
from fish_tuning.scores.totals import Totals

PARTS = 600


def summed(parts: list[Tensor]) -> Tensor:
    total, adds = torch.zeros_like(parts[0], dtype=torch.bfloat16), Rounding()
    for part in parts:
        adds.add("a", total, part)
    return total


@pytest.mark.parametrize("signed", [False, True])
def test_equal_parts_are_not_lost(signed: bool) -> None:
    torch.manual_seed(0)
    part = torch.randn(500) if signed else torch.rand(500)
    found = summed([part] * PARTS).double() / (PARTS * part.double())
    assert (found - 1).abs().max() < 0.03  # to the nearest it would be 0.45 of it
    assert abs(found.mean() - 1) < 5e-4


def test_other_parts_are_right_on_average() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(2000).square() for _ in range(PARTS)]
    found = summed(parts).double() / torch.stack(parts).double().sum(0)
    assert found.std() < 0.025
    assert abs(found.mean() - 1) < 2e-3


def test_sums_are_the_same_bits_again_and_do_not_depend_on_the_layout() -> None:
    parts = list(torch.rand(20, 6, 4, generator=torch.Generator().manual_seed(0)))
    total, adds = torch.zeros(4, 6, dtype=torch.bfloat16).T, Rounding()
    for part in parts:
        adds.add("a", total, part.T.contiguous().T)
    assert torch.equal(summed(parts), summed(parts))
    assert torch.equal(total, summed(parts))


def test_chunks_are_added_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_CHUNK", 64)
    found = summed([torch.full((1000,), 0.3)] * PARTS)
    torch.testing.assert_close(found.float(), torch.full((1000,), 0.3 * PARTS), rtol=0.03, atol=0)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000, -0x800000])
def test_what_is_not_finite_stays_so(bits: int) -> None:
    """The NaN that a GPU gives among it, whose bits are all set."""
    part = torch.tensor([bits] * 300, dtype=torch.int32).view(torch.float32)
    assert not part.isfinite().any()
    assert not summed([part]).isfinite().any()


def test_numbers_that_bfloat16_has_are_added_exactly() -> None:
    part = torch.tensor([0.0, 1.0, -2.5, 1e-38, 2.0**-130])
    assert torch.equal(summed([part, part]).float(), 2 * part.bfloat16().float())


def test_rows_of_a_table_are_added_like_the_rest() -> None:
    totals = Totals.zeros({"table": torch.zeros(6, 50)}, torch.bfloat16, None, gradients=True)
    with torch.sparse.check_sparse_tensor_invariants():
        rows = torch.sparse_coo_tensor(torch.tensor([[1, 4]]), torch.full((2, 50), 0.3), (6, 50)).coalesce()
    for _ in range(PARTS):
        totals.add("table", rows, lambda: rows)
    for found in (totals.squares["table"], totals.gradients["table"]):  # type: ignore[index]
        torch.testing.assert_close(found[[1, 4]].float(), torch.full((2, 50), 0.3 * PARTS), rtol=0.03, atol=0)
        assert not found[[0, 2, 3, 5]].any()


@pytest.mark.parametrize("method", ["auto", "loop"])
@pytest.mark.parametrize("size", [1, 4])
def test_scores_in_bfloat16_whatever_the_size_of_the_batches(size: int, method: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(8, 3), torch.randn(1, 8)

    def scores(dtype: torch.dtype, batches: int, size: int) -> Tensor:
        batch = {"input": x.repeat(size, 1), "labels": torch.zeros(size, dtype=torch.long)}
        return calculate_fisher_information(
            model,
            [batch] * batches,
            method=method,  # type: ignore[arg-type]
            loss_fn=lambda outputs, batch: nn.functional.cross_entropy(outputs, batch["labels"], reduction="none"),
            scores_dtype=dtype,
            progress=False,
        )["weight"]

    found = scores(torch.bfloat16, 400 // size, size)
    assert found.dtype == torch.bfloat16
    assert (found.float() / scores(torch.float32, 1, 2) - 1).abs().max() < 0.04
