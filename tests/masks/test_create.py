"""Exactly k entries, by a fixed order, against a full sort."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import fish_tuning.masks.create as selection
from fish_tuning import FishTuningWarning, MaskError, ZeroScoresError, create_mask_from_fisher, register_selection
from fish_tuning.masks.budgets import matching_names, resolve_budget
from fish_tuning.masks.create import select_top_k
from fish_tuning.masks.selections import SELECTIONS


def count(mask: Mapping[str, Tensor]) -> int:
    return sum(int(selected.sum()) for selected in mask.values())


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def random_scores(levels: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Three small tensors with many ties (few levels)."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"b": (3, 4), "a": (5,), "c": (2, 3, 2)}
    return {n: torch.randint(0, levels, s, generator=generator).to(dtype) / 8 for n, s in shapes.items()}


def slow_mask(scores: Mapping[str, Tensor], k: int, seed: int) -> dict[str, Tensor]:
    """Full sort by (score, random key of the ties with the last one kept, position)."""
    names = sorted(scores)
    values = torch.cat([scores[name].double().flatten() for name in names])
    cut = values.sort(descending=True).values[k - 1]
    keys = torch.zeros(len(values), dtype=torch.long)
    tied = values == cut
    generator = torch.Generator().manual_seed(seed)
    keys[tied] = torch.randint(2**31 - 1, (int(tied.sum()),), generator=generator, dtype=torch.int32).long()
    order = sorted(range(len(values)), key=lambda i: (-float(values[i]), -int(keys[i]), i))
    flat = torch.zeros(len(values), dtype=torch.bool)
    flat[order[:k]] = True
    parts = flat.split([scores[name].numel() for name in names])
    return {name: part.view(scores[name].shape) for name, part in zip(names, parts, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
def test_every_budget_equals_the_full_sort(levels: int, dtype: torch.dtype) -> None:
    scores = random_scores(levels, dtype)
    for k in range(1, 30):
        mask = select_top_k(scores, k, seed=k)
        assert count(mask) == k
        assert same(dict(sorted(mask.items())), slow_mask(scores, k, seed=k)), k


def test_negative_priorities_are_in_order() -> None:
    scores = {"a": torch.tensor([-1.0, 3.0, -2.0, -1e-30, 0.0, 1e-40])}
    kept = [select_top_k(scores, k)["a"].nonzero().flatten().tolist() for k in range(1, 7)]
    assert kept == [[1], [1, 5], [1, 4, 5], [1, 3, 4, 5], [0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]]


def test_negative_zero_ties_with_zero() -> None:
    plus, minus = torch.zeros(50), -torch.zeros(50)
    assert same(select_top_k({"a": plus}, 20), select_top_k({"a": minus}, 20))
    half = torch.cat([plus, minus])
    kept = select_top_k({"a": half}, 50)["a"]
    assert 10 < int(kept[:50].sum()) < 40


def test_dtypes_may_be_mixed() -> None:
    scores = {
        "a": torch.tensor([1.0, 5.0, 3.0], dtype=torch.float64),
        "b": torch.tensor([2.0, 6.0, 4.0]),
        "c": torch.tensor([2.5, 0.5], dtype=torch.bfloat16),
    }
    mask = select_top_k(scores, 4)
    assert {name: kept.tolist() for name, kept in mask.items()} == {
        "a": [False, True, True],
        "b": [False, True, True],
        "c": [False, False],
    }


def test_double_precision_decides() -> None:
    one = torch.tensor([1.0, 1.0 + 1e-12, 1.0], dtype=torch.float64)
    assert select_top_k({"a": one}, 1)["a"].tolist() == [False, True, False]


def test_order_of_the_mapping_does_not_matter() -> None:
    scores = random_scores(2)
    turned = dict(reversed(scores.items()))
    assert list(turned) != list(scores)
    one, other = select_top_k(scores, 9), select_top_k(turned, 9)
    assert list(one) == list(scores)
    assert list(other) == list(turned)
    assert same(one, {name: other[name] for name in one})


@pytest.mark.parametrize("chunk", [1, 3, 7, 12])
def test_chunks_do_not_matter(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = random_scores(3)
    whole = [select_top_k(scores, k, seed=3) for k in (1, 8, 20, 29)]
    monkeypatch.setattr(selection, "_CHUNK", chunk)
    assert all(same(select_top_k(scores, k, seed=3), mask) for k, mask in zip((1, 8, 20, 29), whole, strict=True))


def test_equal_random_keys_fall_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: torch.zeros(size, dtype=torch.int32))
    monkeypatch.setattr(selection, "_CHUNK", 2)
    mask = select_top_k({"b": torch.zeros(5), "a": torch.zeros(4)}, 6)
    assert mask["a"].tolist() == [True] * 4
    assert mask["b"].tolist() == [True, True, False, False, False]


def test_ties_are_drawn_evenly_and_by_seed() -> None:
    scores = {"a": torch.ones(2000), "b": torch.ones(2000)}
    mask = select_top_k(scores, 1000, seed=1)
    assert 430 < int(mask["a"].sum()) < 570
    assert same(mask, select_top_k(scores, 1000, seed=1))
    other = select_top_k(scores, 1000, seed=2)
    assert 300 > int((mask["a"] & other["a"]).sum()) > 60  # 125 by chance


def test_parameters_as_scores() -> None:
    mask = create_mask_from_fisher({"a": torch.nn.Parameter(torch.arange(4.0))}, 0.5)
    assert mask["a"].tolist() == [False, False, True, True]
    assert not mask["a"].requires_grad


def test_shapes_with_no_entries_and_no_dimensions() -> None:
    scores = {"none": torch.zeros(0, 3), "one": torch.tensor(2.0), "many": torch.ones(3)}
    mask = create_mask_from_fisher(scores, num_trainable=1)
    assert {name: tuple(kept.shape) for name, kept in mask.items()} == {"none": (0, 3), "one": (), "many": (3,)}
    assert mask["one"]
    assert not mask["many"].any()


@pytest.mark.parametrize("granularity", ["entry", "row", "column"])
@pytest.mark.parametrize("options", [{"normalize": "module_type"}, {"quotas": "tensor"}])
def test_tensors_without_entries_are_a_part_of_their_own(options: dict[str, Any], granularity: Any) -> None:
    scores = {"none": torch.zeros(0, 3), "some": torch.tensor([[1.0, 3.0, 2.0]])}
    mask = create_mask_from_fisher(scores, num_trainable=3, granularity=granularity, **options)
    assert {name: tuple(kept.shape) for name, kept in mask.items()} == {"none": (0, 3), "some": (1, 3)}
    assert mask["some"].all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_scores_that_are_whole_numbers_have_their_order_in_reverse_too(dtype: torch.dtype) -> None:
    mask = create_mask_from_fisher({"a": torch.tensor([1, 0, 1], dtype=dtype)}, num_trainable=1, method="rev")
    assert mask["a"].tolist() == [False, True, False]


@pytest.mark.parametrize(("dtype", "mean"), [(torch.float32, 1e-40), (torch.float32, 1e38), (torch.float64, 1e-300)])
def test_normalized_scores_may_be_of_any_size(dtype: torch.dtype, mean: float) -> None:
    scores = {"a": torch.tensor([0.0, 1.0, 2.0], dtype=dtype) * mean, "b": torch.tensor([1.5, 1.0, 1.0], dtype=dtype)}
    mask = create_mask_from_fisher(scores, num_trainable=2, normalize="module_type")
    assert mask["a"].tolist() == [False, False, True]
    assert mask["b"].tolist() == [True, False, False]


def test_scores_that_are_not_contiguous() -> None:
    scores = torch.arange(6.0).view(2, 3)
    assert torch.equal(select_top_k({"a": scores.T}, 2)["a"], select_top_k({"a": scores}, 2)["a"].T)


# create_mask_from_fisher


def test_methods_keep_the_same_number() -> None:
    scores = {"a": torch.tensor([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0]]), "head": torch.ones(2)}
    masks = {m: create_mask_from_fisher(scores, 0.5, ["head"], method=m) for m in ("fish", "rand", "rev")}
    assert [count(mask) for mask in masks.values()] == [5, 5, 5]
    assert masks["fish"]["a"].tolist() == [[True, False, True], [False, False, True]]
    assert masks["rev"]["a"].tolist() == [[False, True, False], [True, True, False]]
    assert all(mask["head"].all() and mask["a"].dtype == torch.bool for mask in masks.values())


def test_rand_depends_on_the_seed_and_not_on_scores() -> None:
    scores = {"a": torch.rand(200), "b": torch.rand(100)}
    others = {name: tensor * 7 + 1 for name, tensor in scores.items()}
    one = create_mask_from_fisher(scores, 0.3, method="rand", seed=4)
    assert same(one, create_mask_from_fisher(others, 0.3, method="rand", seed=4))
    assert not same(one, create_mask_from_fisher(scores, 0.3, method="rand", seed=5))


def test_register_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SELECTIONS, "_members", dict(SELECTIONS))

    @register_selection("middle")
    def middle(scores: Tensor) -> Tensor:
        return -(scores - 2.0).abs()

    scores = {"a": torch.tensor([0.0, 2.1, 4.0, 1.5])}
    assert create_mask_from_fisher(scores, 0.5, method="middle")["a"].tolist() == [False, True, False, True]
    assert "middle" in SELECTIONS
    with pytest.raises(MaskError, match=r"allowed are 'fish', 'rand', 'rev', 'middle'. Did you mean 'middle'?"):
        create_mask_from_fisher(scores, 0.5, method="midle")


def test_method_that_draws_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SELECTIONS, "_members", dict(SELECTIONS))
    register_selection("draws")(torch.rand_like)
    with pytest.raises(MaskError, match="must not draw"):
        create_mask_from_fisher({"a": torch.rand(1000) + 1}, num_trainable=500, method="draws")


@pytest.mark.parametrize("budget", [{"num_trainable": 1.5}, {"keep_ratio": "0.5"}])
def test_budgets_of_the_wrong_type_are_errors(budget: dict[str, Any]) -> None:
    with pytest.raises(MaskError, match="must be a"):
        create_mask_from_fisher({"a": torch.rand(10)}, **budget)


def test_method_without_an_order_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SELECTIONS, "_members", dict(SELECTIONS))
    register_selection("log")(lambda scores: (scores - 1.0).log())
    with pytest.raises(MaskError, match=r"not .*(finite|numbers|a number)"):
        create_mask_from_fisher({"a": torch.tensor([0.0, 2.0, 4.0])}, num_trainable=1, method="log")


@pytest.mark.parametrize(("ratio", "kept"), [(0.5, 50), (0.004, 1), (0.015, 2), (0.994, 99), (1.0, 100), (1, 100)])
def test_keep_ratio_rounds_to_the_nearest(ratio: float, kept: int) -> None:
    assert count(create_mask_from_fisher({"a": torch.rand(100) + 1}, ratio)) == kept


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_keep_ratio_outside_the_range(ratio: float) -> None:
    with pytest.raises(MaskError, match=r"keep_ratio=.* is outside \(0, 1\]"):
        create_mask_from_fisher({"a": torch.ones(4)}, ratio)


def test_num_trainable_includes_excluded_tensors() -> None:
    scores = {"lora": torch.rand(3, 4) + 1, "head.weight": torch.zeros(2, 3), "head.bias": torch.zeros(2)}
    for number in range(9, 21):
        mask = create_mask_from_fisher(scores, names_to_exclude=["head"], num_trainable=number)
        assert count(mask) == number
        assert mask["head.weight"].all()
        assert mask["head.bias"].all()


@pytest.mark.parametrize("number", [-1, 0, 8, 21])
def test_num_trainable_that_cannot_be_met_tells_what_can(number: int) -> None:
    scores = {"lora": torch.ones(3, 4), "head": torch.ones(2, 4)}
    with pytest.raises(MaskError, match=f"num_trainable={number} cannot be met: 8 .* so 9 to 20 are possible"):
        create_mask_from_fisher(scores, names_to_exclude=["head"], num_trainable=number)


def test_exactly_one_budget() -> None:
    for budgets in ({}, {"keep_ratio": 0.5, "num_trainable": 3}):
        with pytest.raises(MaskError, match=r"exactly one of keep_ratio .* and num_trainable"):
            create_mask_from_fisher({"a": torch.ones(4)}, **budgets)  # type: ignore[arg-type]
    assert resolve_budget(10, 5, keep_ratio=0.5) == 5
    assert resolve_budget(10, 5, num_trainable=7) == 2


def test_names_to_exclude_are_searched_for() -> None:
    names = ["layer.0.lora_A", "layer.10.lora_A", "classifier.weight", "classifier.bias"]
    assert matching_names(names, ["classifier"]) == set(names[2:])
    assert matching_names(names, "classifier") == set(names[2:])
    assert matching_names(names, [r"layer\.1\d*\.", "bias$"]) == {names[1], names[3]}
    assert matching_names(names, []) == set()


def test_names_to_exclude_that_match_nothing_or_everything() -> None:
    scores = {"lora": torch.ones(3)}
    with pytest.raises(MaskError, match=r"'head' matches none of the 1 tensors, e.g. 'lora'"):
        create_mask_from_fisher(scores, 0.5, ["head"])
    with pytest.raises(MaskError, match="matches all of them"):
        create_mask_from_fisher(scores, 0.5, ["lora"])
    with pytest.raises(MaskError, match=r"'\(' is no regular expression"):
        create_mask_from_fisher(scores, 0.5, ["("])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_must_be_finite(bad: float) -> None:
    with pytest.raises(MaskError, match="'b' are not all finite"):
        create_mask_from_fisher({"a": torch.ones(3), "b": torch.tensor([1.0, bad])}, 0.5)


def test_no_scores() -> None:
    with pytest.raises(MaskError, match="empty"):
        create_mask_from_fisher({}, 0.5)


def test_unknown_zero_scores_option() -> None:
    with pytest.raises(MaskError, match="allowed are 'warn', 'error', 'ignore'"):
        create_mask_from_fisher({"a": torch.ones(3)}, 0.5, zero_scores="raise")  # type: ignore[arg-type]


# Entries that scored zero

HALF_DEAD = {"x.lora_A": torch.zeros(4, 5), "x.lora_B": torch.cat([torch.rand(15) + 1, torch.tensor([-0.0] * 5)])}
FACTS = [
    "20 entries",
    "only 15 of the pool's 40",
    "so 5 are",
    "1 of 2 tensors",
    "'x.lora_A'",
    "B = 0",
    "pissa",
    "warm-up",
]


def test_zero_scores_warn_with_the_facts_where_they_happen() -> None:
    with pytest.warns(FishTuningWarning) as caught:
        mask = create_mask_from_fisher(HALF_DEAD, 0.5)
    assert count(mask) == 20
    assert mask["x.lora_B"][:15].all()
    assert all(fact in str(caught[0].message) for fact in FACTS)
    assert caught[0].filename == __file__


def test_zero_scores_can_be_an_error() -> None:
    with pytest.raises(ZeroScoresError) as error:
        create_mask_from_fisher(HALF_DEAD, 0.5, zero_scores="error")
    assert all(fact in str(error.value) for fact in FACTS)


@pytest.mark.parametrize(
    "arguments",
    [
        {"keep_ratio": 0.5, "zero_scores": "ignore"},
        {"num_trainable": 15},
        {"keep_ratio": 0.5, "method": "rand"},
        {"keep_ratio": 0.5, "method": "rev"},
        {"num_trainable": 35, "names_to_exclude": ["lora_A"]},
    ],
)
def test_zero_scores_are_fine(arguments: dict[str, object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_mask_from_fisher(HALF_DEAD, **arguments)  # type: ignore[arg-type]


MEMORY = """
import sys, torch
import fish_tuning.masks.create as selection
torch.set_num_threads(1)

def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024

number = 50_000_000
scores = {"a": torch.rand(number // 2), "b": torch.rand(number // 2)}
if sys.argv[1] == "ties":
    for tensor in scores.values():
        tensor.mul_(4).floor_()
selection.select_top_k({"warm": torch.rand(10)}, 3)
before = peak()
mask = selection.create_mask_from_fisher(scores, 0.4)
assert sum(int(m.sum()) for m in mask.values()) == number * 2 // 5
print(peak() - before - number)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak memory from /proc")
@pytest.mark.parametrize("kind", ["distinct", "ties"])
def test_memory_beside_scores_and_mask_is_bounded(kind: str, python_environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, kind], capture_output=True, text=True, env=python_environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300e6
