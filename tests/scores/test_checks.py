"""Checksums of gradients and their squares, and what their comparison says."""

from __future__ import annotations

import pytest
import torch

from fish_tuning.scores.checks import (
    Checksumming,
    Checksums,
    Comparison,
    distance,
    random_weights,
    room_alone,
    tolerance,
)

checksum = Checksumming().checksum


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torch_s_defaults_change_no_checksum(dtype: torch.dtype) -> None:
    rows, expected, weights = torch.randn(5, 3), Checksumming(), random_weights(7, 0)
    wanted = expected.checksum(rows)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(Checksumming().checksum(rows), wanted)
        assert torch.equal(random_weights(7, 0), weights)
    finally:
        torch.set_default_dtype(torch.float32)


def norm(checksum: torch.Tensor) -> torch.Tensor:
    return checksum[1:].square().mean()


def test_a_checksum_is_the_sum_and_16_projections_by_signs() -> None:
    found = checksum(torch.ones(5, 3))
    assert found.shape == (17,)
    assert found[0] == 15
    one_entry = torch.zeros(5, 3)
    one_entry[3, 2] = 2.0
    assert checksum(one_entry)[1:].abs().tolist() == [2.0] * 16
    assert torch.equal(checksum(one_entry.view(5, 3, 1)), checksum(one_entry))
    assert all(checksum(torch.zeros(shape)).tolist() == [0.0] * 17 for shape in ((0,), (0, 3), (3, 0), ()))


@pytest.mark.parametrize("tolerance", [1e-3, 0.1])
@pytest.mark.parametrize("moved", ["a row further", "a column further", "turned"])
@pytest.mark.parametrize("entries", [1, 64, 4096])
def test_squares_in_another_place_are_told(entries: int, moved: str, tolerance: float) -> None:
    squares = torch.zeros(4096, 8)
    squares[:entries] = torch.rand(entries, 8, generator=torch.Generator().manual_seed(0))
    others = {"a row further": squares.roll(1, 0), "a column further": squares.roll(1, 1), "turned": squares.flip(0)}
    plain, rule = {"a": checksum(squares).double()}, {"a": checksum(others[moved]).double()}
    assert rule["a"][0] == pytest.approx(float(plain["a"][0]))
    assert Comparison.of(["a"], rule, plain, tolerance, floor=0.0).disagree == {"a"}
    assert Comparison.of(["a"], plain, plain, tolerance, floor=0.0).right == {"a"}


def test_rounding_is_let_pass() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(300, 40, generator=generator)
    rounded = gradient * (1 + 0.03 * torch.randn(300, 40, generator=generator))
    plain, rule = ({"a": checksum(each.square()).double()} for each in (gradient, rounded))
    assert Comparison.of(["a"], rule, plain, 0.1, floor=0.0).right == {"a"}
    assert Comparison.of(["a"], rule, plain, 1e-3, floor=0.0).disagree == {"a"}


@pytest.mark.parametrize("signed", [False, True])
def test_gradients_that_are_all_rounding_agree_in_nothing_and_pass(signed: bool) -> None:
    """A key's bias changes no softmax. What is larger and differs as much is told, and signs of what is no noise."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 300, 40, generator=generator)
    other *= one.norm() / other.norm()
    made, floor = Checksumming(signed), 1e-10

    def of(gradient: torch.Tensor) -> dict[str, torch.Tensor]:
        sums: dict[str, torch.Tensor] = {}
        made.add_gradient(sums, "a", gradient)
        return {name: found.double() for name, found in sums.items()}

    for size, agrees in ((4e-7, True), (2e-5, False)):  # of all gradients, 1
        rule, plain = (of(each * (size / one.norm())) for each in (one, other))
        assert bool(Comparison.of(["a"], rule, plain, 1e-3, floor).agree) is agrees
    opposite, plain = (of(one * (size / one.norm())) for size in (-2e-6, 2e-6))
    assert bool(Comparison.of(["a"], opposite, plain, 1e-3, floor).agree) is not signed


def test_checksums_are_linear_and_those_of_sparse_tensors_too() -> None:
    one, other = torch.randn(5, 3), torch.zeros(5, 3)
    other[[1, 4]] = torch.randn(2, 3)
    assert torch.allclose(checksum(one + 2 * other), checksum(one) + 2 * checksum(other), atol=1e-5)
    assert torch.allclose(checksum(other.to_sparse(1).coalesce()), checksum(other), atol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (40,), (8, 6), (4, 3, 2, 2)])
def test_projections_tell_how_far_apart_tensors_are(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(50):
        gradient = torch.randn(shape, generator=generator)
        ratios.append(float(norm(checksum(gradient)) / gradient.square().sum()))
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


def test_more_rounding_has_more_room() -> None:
    assert tolerance({torch.float32, torch.float64}) == tolerance(set()) == 1e-3
    dtypes = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
    of_one = [tolerance({dtype}) for dtype in dtypes]
    assert of_one == sorted(set(of_one))
    assert tolerance({torch.float32, torch.bfloat16}) == tolerance({torch.bfloat16})
    assert tolerance({torch.uint8, torch.float32}) == tolerance({torch.bfloat16})
    alone = [room_alone({dtype}) for dtype in (torch.float16, torch.bfloat16, torch.int8)]
    assert alone == sorted(set(alone))
    assert room_alone({torch.float32, torch.bfloat16}) == room_alone({torch.bfloat16})


def test_distance_of_two_gradients_of_a_model() -> None:
    def sums(*tensors: torch.Tensor) -> Checksums:
        return {str(number): checksum(tensor.square()).double() for number, tensor in enumerate(tensors)}

    one, small = torch.randn(30, 40), 1e-3 * torch.randn(30, 40)
    assert distance({}, {}) == distance(sums(torch.zeros(3)), sums(torch.zeros(3))) == 0
    assert distance(sums(one, small), sums(one, small)) == 0
    assert distance(sums(one, small), sums(1.01 * one, small)) == pytest.approx(0.02, rel=0.05)
    assert distance(sums(one, small), sums(one, small.roll(1, 0))) < 1e-5, "little of the whole"
    assert distance(sums(one, small), sums(one.roll(1, 0), small)) > 0.5
    assert distance(sums(one), sums(torch.zeros(30, 40))) == distance({}, sums(one)) == 1
    assert not distance(sums(one), sums(one * float("nan"))) <= 1e9


def test_weights_are_far_from_zero_and_the_same_for_the_same_batch() -> None:
    weights = random_weights(100, seed=3)
    assert weights.abs().min() >= 1
    assert weights.abs().max() < 2
    assert (weights > 0).any()
    assert (weights < 0).any()
    assert torch.equal(weights, random_weights(100, seed=3))


def test_comparison() -> None:
    def sums(first: float, others: float = 0.0) -> torch.Tensor:
        return torch.tensor([first, *[others] * 16], dtype=torch.float64)

    plain = {name: sums(4.0, 1.0) for name in ("same", "other", "moved", "missed")}
    plain |= {"tiny": sums(1e-9, 1e-9), "nan": sums(float("nan")), "nan elsewhere": sums(1e-9, float("nan"))}
    plain |= {"tiny but the same": sums(1e-9, 1e-9), "tiny and not seen": sums(1e-9, 1e-9)}
    rule = plain | {"other": sums(4.1, 1.0), "moved": sums(4.0, 1.1), "tiny": sums(1e-12), "tiny and not seen": sums(0)}
    del rule["missed"]
    found = Comparison.of([*plain, "neither"], rule, plain, tolerance=1e-3, floor=1e-5)
    assert found.right == {"same", "tiny but the same"}
    assert found.agree == {"same", "tiny but the same", "tiny", "neither"}
    assert found.disagree == {"other", "moved", "missed", "nan", "nan elsewhere", "tiny and not seen"}
