"""Checksums of gradients and their squares, and what their comparison says."""

from __future__ import annotations

import pytest
import torch

from fish_tuning.scores.checks import Checksumming, Checksums, Comparison, random_weights

checksum, projections = Checksumming().checksum, Checksumming().projections


def test_checksums_tell_apart_what_is_only_moved() -> None:
    one, other = checksum(torch.tensor([[1.0, 2.0], [3.0, 4.0]])), checksum(torch.tensor([[1.0, 3.0], [2.0, 4.0]]))
    assert one[0] == other[0] == 10
    assert one[1] != other[1]


def test_checksum_tells_the_place_of_the_entries() -> None:
    squares = torch.rand(3, 4)
    turned = squares.flip(1)
    assert checksum(squares)[0] == pytest.approx(float(checksum(turned)[0]))
    assert checksum(squares)[1] != pytest.approx(float(checksum(turned)[1]), rel=1e-3)
    assert checksum(torch.zeros(0)).tolist() == [0, 0, 0, 0]


def test_checksum_is_four_sums_weighted_by_place() -> None:
    squares = torch.rand(5, 3)
    rows, columns = torch.linspace(0, 1, 5)[:, None], torch.linspace(0, 1, 3)
    expected = [squares.sum(), (squares * columns).sum(), (squares * rows).sum(), (squares * rows * columns).sum()]
    torch.testing.assert_close(checksum(squares), torch.stack(expected))
    torch.testing.assert_close(checksum(squares.view(5, 3, 1)), torch.stack(expected))


def test_sparse_squares_have_the_checksum_of_the_dense_ones() -> None:
    dense = torch.zeros(5, 3)
    dense[[1, 4]] = torch.rand(2, 3)
    assert torch.allclose(checksum(dense.to_sparse(1).coalesce()), checksum(dense))


def test_projections_are_linear_and_those_of_sparse_gradients_too() -> None:
    one, other = torch.randn(5, 3), torch.zeros(5, 3)
    other[[1, 4]] = torch.randn(2, 3)
    assert torch.allclose(projections(one + 2 * other), projections(one) + 2 * projections(other), atol=1e-5)
    assert torch.allclose(projections(other.to_sparse(1).coalesce()), projections(other))


@pytest.mark.parametrize("shape", [(), (1,), (40,), (8, 6), (4, 3, 2, 2)])
def test_projections_tell_how_far_apart_gradients_are(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(50):
        gradient = torch.randn(shape, generator=generator)
        ratios.append(float(projections(gradient).square().mean() / gradient.square().sum()))
    assert min(ratios) > 0.05
    assert max(ratios) < 5


@pytest.mark.parametrize("tolerance", [1e-3, 0.1])
@pytest.mark.parametrize("wrong", ["negated", "abs", "one row negated"])
def test_signs_are_told_apart_where_squares_and_sums_are_equal(wrong: str, tolerance: float) -> None:
    gradient = torch.tensor([[1.0, -1.0, 2.0], [-2.0, 3.0, -3.0]])  # adds up to 0
    found = {"negated": -gradient, "abs": gradient.abs(), "one row negated": gradient * torch.tensor([[1.0], [-1.0]])}
    plain: Checksums = {}
    rule: Checksums = {}
    signed = Checksumming(signed=True)
    signed.add(plain, "a", gradient.square(), lambda: gradient)
    signed.add(rule, "a", gradient.square(), lambda: found[wrong])
    assert Comparison.of(["a"], plain, plain, tolerance, floor=0.0).right == {"a"}
    assert Comparison.of(["a"], rule, plain, tolerance, floor=0.0).disagree == {"a"}
    assert Comparison.of(["a"], {}, plain, tolerance, floor=0.0).disagree == {"a"}


def test_weights_are_far_from_zero_and_the_same_for_the_same_batch() -> None:
    weights = random_weights(100, seed=3)
    assert weights.abs().min() >= 1
    assert weights.abs().max() < 2
    assert (weights > 0).any()
    assert (weights < 0).any()
    assert torch.equal(weights, random_weights(100, seed=3))


def test_comparison() -> None:
    sums = torch.tensor([4.0, 2.0, 3.0, 1.5])
    tiny, nan = torch.tensor([1e-9, 1e-9, 0.0, 0.0]), torch.tensor([float("nan"), 0.0, 0.0, 0.0])
    plain = {"same": sums, "other": sums, "moved": sums, "tiny": tiny, "missed": sums, "nan": nan}
    rule = plain | {
        "other": sums + torch.tensor([0.1, 0.0, 0.0, 0.0]),
        "moved": sums + torch.tensor([0.0, 0.0, 0.0, 0.1]),
        "tiny": torch.zeros(4),
    }
    del rule["missed"]
    found = Comparison.of([*plain, "neither"], rule, plain, tolerance=1e-3, floor=1e-5)
    assert found.right == {"same"}
    assert found.agree == {"same", "tiny", "neither"}
    assert found.disagree == {"other", "moved", "missed", "nan"}
