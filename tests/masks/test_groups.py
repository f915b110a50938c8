"""Rows, columns and components: exact numbers, in order, against brute force."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from fuzz import settings
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fish_tuning import FishTuningWarning, MaskError, create_mask_from_fisher, register_selection
from fish_tuning.masks.budgets import floor_parts
from fish_tuning.masks.create import check_choice
from fish_tuning.masks.groups import families, take_exactly
from fish_tuning.masks.selections import SELECTIONS
from fish_tuning.masks.sums import Place, can_be, nearest


def lora_scores(seed: int = 0) -> dict[str, Tensor]:
    """Two layers with a pair of 4 components of 14 entries and one of 3 components of 28."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        f"m.{layer}.{part}.lora_{factor}.default.weight": shape
        for layer in range(2)
        for part, rank, inputs, outputs in (("query", 4, 8, 6), ("up", 3, 8, 20))
        for factor, shape in (("A", (rank, inputs)), ("B", (outputs, rank)))
    }
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def count(mask: dict[str, Tensor]) -> int:
    return sum(int(selected.sum()) for selected in mask.values())


def components(mask: dict[str, Tensor]) -> dict[str, list[bool]]:
    """By pair; both factors must tell the same, and hold whole slices."""
    found = {}
    for name, selected in mask.items():
        if "lora_A" in name:
            other = mask[name.replace("lora_A", "lora_B")].T
            assert torch.equal(selected.any(1), other.any(1))
            assert torch.equal(selected.any(1), selected.all(1))
            assert torch.equal(other.any(1), other.all(1))
            found[name] = selected.any(1).tolist()
    return found


def slow_take(sizes: Sequence[int], k: int) -> list[int] | None:
    """Of all sets that add up to k, the one that takes the earliest groups: the first in lexicographic order."""
    sets = [
        list(chosen)
        for number in range(len(sizes) + 1)
        for chosen in itertools.combinations(range(len(sizes)), number)
        if sum(sizes[i] for i in chosen) == k
    ]
    return min(sets, key=lambda chosen: [*chosen, len(sizes)]) if sets else None


@settings()
@given(st.lists(st.integers(1, 7), max_size=9), st.integers(0, 40))
def test_taking_exactly_is_the_first_set_that_fits(sizes: list[int], k: int) -> None:
    expected = slow_take(sizes, k)
    if expected is None:
        with pytest.raises(MaskError, match="the nearest are"):
            take_exactly(sizes, k)
    else:
        assert take_exactly(sizes, k) == expected


def slow_take_with_floors(
    sizes: Sequence[int], k: int, places: Sequence[int], floors: Sequence[int]
) -> set[int] | None:
    """Groups below their floor first, each taken if any of all sets that will do has it beside those taken so far."""
    numbers = range(len(sizes))
    sets = [
        set(chosen)
        for number in range(len(sizes) + 1)
        for chosen in itertools.combinations(numbers, number)
        if sum(sizes[i] for i in chosen) == k
        and all(sum(sizes[i] for i in chosen if places[i] == p) >= least for p, least in enumerate(floors))
    ]
    if not sets:
        return None
    taken: set[int] = set()
    needs = [*floors, 0]
    below = lambda i: sum(sizes[j] for j in taken if places[j] == places[i]) < needs[places[i]]  # noqa: E731
    for in_need in (True, False):
        for i in numbers:
            if below(i) or not in_need:
                with_it = [chosen for chosen in sets if i in chosen]
                taken |= {i} if with_it else set()
                sets = with_it or sets
    return taken


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 7), st.integers(0, 2)), min_size=1, max_size=9),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.integers(0, 40),
)
def test_floors_of_groups_of_several_sizes(groups: list[tuple[int, int]], floors: tuple[int, int], k: int) -> None:
    sizes, places = [size for size, _ in groups], [place for _, place in groups]
    expected = slow_take_with_floors(sizes, k, places, floors)
    if expected is None:
        with pytest.raises(MaskError, match="and meets the floors"):
            take_exactly(sizes, k, places, floors)
    else:
        assert set(take_exactly(sizes, k, places, floors)) == expected


@settings(max_examples=200)
@given(st.lists(st.tuples(st.lists(st.integers(1, 7), max_size=4), st.integers(0, 9)), max_size=3), st.integers(0, 40))
def test_what_groups_add_up_to(groups: list[tuple[list[int], int]], k: int) -> None:
    possible = {0}
    for sizes, least in groups:
        own = {sum(some) for n in range(len(sizes) + 1) for some in itertools.combinations(sizes, n)}
        possible = {total + number for total in possible for number in own if number >= least}
    places = [Place(Counter(sizes), least) for sizes, least in groups]
    assert can_be(k, places) == (k in possible)
    below, above = [n for n in sorted(possible) if 0 < n <= k], [n for n in sorted(possible) if n > k]
    assert nearest(k, places) == sorted({*below[-1:], *above[:1]})


def test_the_nearest_numbers_can_be_had() -> None:
    with pytest.raises(MaskError, match=r"has 31 of the pool's 62 entries; the nearest are 28 and 34,"):
        take_exactly([10, 10, 14, 28], 31)
    with pytest.raises(MaskError, match="the nearest are 62, beside"):
        take_exactly([10, 10, 14, 28], 63)


def test_many_groups_are_taken_at_once() -> None:
    sizes = [384, 1536, 384, 64] * 25_000
    assert sum(sizes[i] for i in take_exactly(sizes, 384 * 1001 + 64)) == 384 * 1001 + 64


def test_single_entries_among_many_rows() -> None:
    sizes = [768, 1, 3072, 1] * 20_000
    k = sum(sizes) // 2 + 1
    assert sum(sizes[i] for i in take_exactly(sizes, k)) == k


@pytest.mark.parametrize("k", [14, 28, 42, 70, 98, 182, 280])
@pytest.mark.parametrize("method", ["fish", "rand", "rev"])
def test_components_are_whole_and_the_number_exact(k: int, method: str) -> None:
    mask = create_mask_from_fisher(lora_scores(), num_trainable=k, granularity="component", method=method)
    assert count(mask) == k
    components(mask)


def test_components_with_the_best_means_come_first() -> None:
    scores = lora_scores()
    means = {}
    for name, tensor in scores.items():
        if "lora_A" in name:
            other = scores[name.replace("lora_A", "lora_B")]
            for j in range(len(tensor)):
                total = tensor[j].sum() + other[:, j].sum()
                means[name, j] = (float(total) / (tensor.shape[1] + len(other)), tensor.shape[1] + len(other))
    best = sorted(means, key=lambda key: -means[key][0])[:5]
    budget = sum(means[key][1] for key in best)
    found = components(create_mask_from_fisher(scores, num_trainable=budget, granularity="component"))
    assert {(name, j) for name, kept in found.items() for j, yes in enumerate(kept) if yes} == set(best)


@pytest.mark.parametrize(("granularity", "axis"), [("row", 1), ("column", 0)])
def test_rows_and_columns_are_whole(granularity: str, axis: int) -> None:
    scores = {"conv": torch.rand(4, 2, 3), "bias": torch.rand(4), "matrix": torch.rand(6, 6)}
    mask = create_mask_from_fisher(scores, num_trainable=28, granularity=granularity)  # type: ignore[arg-type]
    assert count(mask) == 28
    for selected in (mask["conv"].flatten(1), mask["matrix"]):
        assert torch.equal(selected.any(axis), selected.all(axis))


def test_entries_as_groups_are_the_entries() -> None:
    scores = {name: (8 * tensor).round() for name, tensor in lora_scores().items()}
    shapes = {name: tensor.shape for name, tensor in scores.items()}
    assert all(family.size == 1 for family in families(shapes, "entry"))
    assert sum(family.number for family in families(shapes, "entry")) == sum(map(torch.numel, scores.values()))


def test_order_of_the_mapping_and_seed() -> None:
    flat = {name: torch.ones_like(tensor) for name, tensor in lora_scores().items()}
    masks = [
        create_mask_from_fisher(dict(order), num_trainable=70, granularity="component", seed=seed)
        for order, seed in ((flat.items(), 0), (reversed(flat.items()), 0), (flat.items(), 1))
    ]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in flat)
    assert any(not torch.equal(masks[0][name], masks[2][name]) for name in flat)


def test_embeddings_and_convolutions_have_components() -> None:
    scores = {
        "e.lora_embedding_A.default": torch.rand(3, 10), "e.lora_embedding_B.default": torch.rand(5, 3),
        "c.lora_A.default.weight": torch.rand(3, 2, 3, 3), "c.lora_B.default.weight": torch.rand(4, 3, 1, 1),
    }  # fmt: skip
    mask = create_mask_from_fisher(scores, num_trainable=15 + 22, granularity="component")
    assert count(mask) == 37
    assert torch.equal(
        mask["c.lora_A.default.weight"].flatten(1).any(1), mask["c.lora_B.default.weight"].any(0)[:, 0, 0]
    )


@pytest.mark.parametrize("granularity", ["entry", "row", "component"])
def test_floors_are_kept_and_the_rest_goes_to_the_best(granularity: str) -> None:
    scores = lora_scores()
    scores = {name: tensor * (100 if ".1." in name else 1) for name, tensor in scores.items()}
    plain, floored = (
        create_mask_from_fisher(scores, num_trainable=84, granularity=granularity, floors=floors)  # type: ignore[arg-type]
        for floors in (None, {"layer": 14})
    )
    of_layer = lambda mask, layer: sum(int(m.sum()) for name, m in mask.items() if f".{layer}." in name)  # noqa: E731
    assert of_layer(plain, 0) == 0
    assert count(floored) == 84
    assert 14 <= of_layer(floored, 0) < 14 + (14 if granularity == "component" else 8)


def test_floors_of_entries_are_the_best_of_each_tensor() -> None:
    scores = lora_scores()
    mask = create_mask_from_fisher(scores, num_trainable=60, floors={"tensor": 3})
    for name, tensor in scores.items():
        best = tensor.flatten().topk(3).indices
        assert bool(mask[name].flatten()[best].all())
    assert count(mask) == 60


@pytest.mark.parametrize("kind", ["tensor", "layer", "module_type"])
def test_quotas_of_each(kind: str) -> None:
    mask = create_mask_from_fisher(lora_scores(), keep_ratio=0.25, quotas=kind)  # type: ignore[arg-type]
    assert count(mask) == round(0.25 * 280)
    if kind == "tensor":
        assert all(abs(int(m.sum()) - 0.25 * m.numel()) < 1 for m in mask.values())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"granularity": "componet"}, "granularity='componet' is not known; allowed are 'entry', 'row'"),
        ({"granularity": "component", "floors": {"tensor": 1}}, "which are in different groups"),
        ({"granularity": "component", "quotas": "module_type"}, "which are in different groups"),
        ({"floors": {"tensor": 33}}, "'tensor' = 33 is more than the 32 entries"),
        ({"floors": {"layer": 0.5}}, "they keep 140 entries in 2 groups, more than the 70 to keep in all"),
        ({"floors": {"query": 1, "lora_A": 1}}, "has more than one"),
        ({"floors": {"nothing": 1}}, "matches none"),
        ({"floors": {"tensor": 0}}, "must be a whole number from 1, or a share"),
        ({"floors": {"tensor": 1.5}}, "must be a whole number from 1, or a share"),
        ({"floors": {"tensor": True}}, "must be a whole number from 1, or a share"),
        ({"floors": {"tensor": 1}, "quotas": "layer"}, "give one of the two"),
    ],
)
def test_what_cannot_be_met_is_refused_without_any_score(choice: dict[str, object], message: str) -> None:
    scores = lora_scores()
    with pytest.raises(MaskError, match=message):
        check_choice({name: tensor.shape for name, tensor in scores.items()}, 70, **choice)  # type: ignore[arg-type]
    with pytest.raises(MaskError, match=message):
        create_mask_from_fisher(scores, num_trainable=70, **choice)  # type: ignore[arg-type]


def test_tensors_without_components_are_named() -> None:
    scores = lora_scores() | {"m.0.query.lora_magnitude_vector.default.weight": torch.rand(6)}
    with pytest.raises(MaskError, match=r"lora_magnitude_vector\.default\.weight' is no factor of a LoRA pair"):
        create_mask_from_fisher(scores, num_trainable=28, granularity="component")
    mask = create_mask_from_fisher(
        scores, num_trainable=28 + 6, granularity="component", names_to_exclude=["magnitude"]
    )
    assert count(mask) == 34


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(3, 6)), min_size=2, max_size=3),
    st.lists(st.integers(1, 6), min_size=1, max_size=2),
    st.integers(3, 20),
    st.sampled_from(["fish", "rand", "rev"]),
)
def test_floors_and_number_together_or_refused(
    shapes: list[tuple[int, int]], least: list[int], k: int, method: str
) -> None:
    scores = {f"t{i}": torch.rand(shape) for i, shape in enumerate(shapes)}
    floors = {f"t{i}": number for i, number in enumerate(least[: len(shapes)])}
    k = min(k, sum(map(torch.numel, scores.values())))
    possible = any(
        sum(rows * width for rows, (_, width) in zip(taken, shapes, strict=True)) == k
        and all(taken[i] * shapes[i][1] >= floors.get(f"t{i}", 0) for i in range(len(shapes)))
        for taken in itertools.product(*(range(rows + 1) for rows, _ in shapes))
    )
    if not possible:
        with pytest.raises(MaskError, match=r"floors|the nearest are"):
            check_choice({name: tensor.shape for name, tensor in scores.items()}, k, granularity="row", floors=floors)
        return
    mask = create_mask_from_fisher(scores, num_trainable=k, granularity="row", floors=floors, method=method)
    assert count(mask) == k
    for name, selected in mask.items():
        assert int(selected.sum()) >= floors.get(name, 0)
        assert torch.equal(selected.any(1), selected.all(1))


def test_a_floor_passes_over_what_is_too_large() -> None:
    scores = {name: tensor * (100 if ".up." in name else 1) for name, tensor in lora_scores().items()}
    mask = create_mask_from_fisher(scores, num_trainable=42, granularity="component", floors={"layer": 14})
    assert count(mask) == 42
    with pytest.raises(MaskError, match=r"has 42 of the pool's 280 entries and meets the floors; the nearest are 56,"):
        create_mask_from_fisher(scores, num_trainable=42, granularity="component", floors={"layer": 15})


def test_shares_of_floors_are_what_they_say() -> None:
    assert floor_parts({"a": 100}, 50, {"a": 0.07}) == [(["a"], 7)]  # in floats, 0.07 * 100 is above 7
    assert floor_parts({"a": 10}, 5, {"a": 0.25}) == [(["a"], 3)]


def test_floors_that_keep_what_scored_zero_are_told() -> None:
    scores = {"a": torch.zeros(10), "b": torch.rand(10) + 1}
    with pytest.warns(FishTuningWarning, match="5 entries are to be kept, .* so 3 are chosen at random"):
        create_mask_from_fisher(scores, num_trainable=5, floors={"a": 3})


def test_a_component_between_floors_is_named() -> None:
    with pytest.raises(MaskError, match=r"lies in 'm\.1\.up\.lora_A.* and 'm\.1\.up\.lora_B"):
        create_mask_from_fisher(
            lora_scores(), num_trainable=70, granularity="component", floors={r"m\.0|query|1\.up\.lora_A": 1}
        )


def test_the_nearest_numbers_hold_the_floors() -> None:
    scores = {"a": torch.rand(3, 4), "b": torch.rand(3, 3)}
    with pytest.raises(
        MaskError, match=r"has 6 of the pool's 21 entries and meets the floors; the nearest are 4 and 7,"
    ):
        create_mask_from_fisher(scores, num_trainable=6, granularity="row", floors={"a": 1})


def test_floors_beside_priorities_of_minus_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SELECTIONS, "_members", dict(SELECTIONS))
    register_selection("log")(torch.log)
    scores = {"a": torch.tensor([0.0, 0, 0, 0, 5, 6]), "b": torch.zeros(4)}
    for seed in range(8):
        mask = create_mask_from_fisher(scores, num_trainable=6, floors={"b": 2}, method="log", seed=seed)
        assert count(mask) == 6


def test_groups_without_an_order_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SELECTIONS, "_members", dict(SELECTIONS))
    register_selection("log")(lambda scores: (scores - 1).log())
    register_selection("one")(lambda scores: torch.ones(1))
    for method, message in (("log", "not numbers"), ("one", "in the same shape")):
        with pytest.raises(MaskError, match=message):
            create_mask_from_fisher(lora_scores(), num_trainable=28, granularity="component", method=method)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_any_precision_that_require_grad(dtype: torch.dtype) -> None:
    scores = {name: tensor.to(dtype).requires_grad_() for name, tensor in lora_scores().items()}
    assert count(create_mask_from_fisher(scores, num_trainable=42, granularity="component")) == 42


def test_tensors_without_entries_have_no_groups() -> None:
    scores = lora_scores() | {"empty": torch.zeros(3, 0)}
    assert count(create_mask_from_fisher(scores, num_trainable=30, granularity="row")) == 30


def test_components_that_scored_by_one_factor_are_no_choice_at_random(recwarn: pytest.WarningsRecorder) -> None:
    scores = {name: tensor * ("lora_B" in name) for name, tensor in lora_scores().items()}
    create_mask_from_fisher(scores, num_trainable=252, granularity="component")
    assert not recwarn.list
    dead = {name: tensor * (".0." in name) for name, tensor in scores.items()}
    with pytest.warns(FishTuningWarning, match="only 140 of the pool's 280 have a score above zero, so 112"):
        create_mask_from_fisher(dead, num_trainable=252, granularity="component")


def test_quotas_that_whole_groups_cannot_have_are_named() -> None:
    with pytest.raises(MaskError, match=r"quotas: 4 tensors, 'm\.0\.query.* first, are to keep 35\. No set of whole"):
        create_mask_from_fisher(lora_scores(), num_trainable=70, granularity="component", quotas="layer")
