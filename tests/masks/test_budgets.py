"""Names, budgets and quotas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fish_tuning import FishTuningWarning, MaskError, create_mask_from_fisher
from fish_tuning.masks.budgets import module_type, split_budget


def scores() -> dict[str, Tensor]:
    """Two kinds of modules whose gradients differ a thousandfold, and a head."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) + 0.1

    return {
        "layer.0.query.lora_A.default.weight": draw(4, 5),
        "layer.1.query.lora_A.default.weight": draw(4, 5),
        "layer.0.mlp.adapter_up.default.weight": 1000 * draw(3, 4),
        "layer.1.mlp.adapter_up.default.weight": 1000 * draw(3, 4),
        "classifier.modules_to_save.default.weight": draw(2, 2),
    }


def kept(mask: dict[str, Tensor], part: str) -> int:
    return sum(int(selected.sum()) for name, selected in mask.items() if part in name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default.weight", "query.lora_A"),
        ("layers.3.mlp.ia3_l.default", "mlp.ia3_l"),
        ("prompt_encoder.default.embedding.weight", "prompt_encoder.embedding"),
        ("weight", ""),
    ],
)
def test_module_type(name: str, expected: str) -> None:
    assert module_type(name) == expected


def test_a_global_pool_starves_the_module_with_small_gradients() -> None:
    mask = create_mask_from_fisher(scores(), 0.375, ["classifier"])
    assert (kept(mask, "adapter"), kept(mask, "lora")) == (24, 0)


def test_quotas_by_module_type_keep_one_ratio() -> None:
    mask = create_mask_from_fisher(scores(), 0.375, ["classifier"], quotas="module_type")
    assert (kept(mask, "adapter"), kept(mask, "lora"), kept(mask, "classifier")) == (9, 15, 4)


@pytest.mark.parametrize("method", ["fish", "rand", "rev"])
def test_given_quotas_hold_for_every_method(method: str) -> None:
    mask = create_mask_from_fisher(
        scores(), num_trainable=14, names_to_exclude=["classifier"], quotas={"lora": 0.75, "adapter": 0.25},
        method=method,
    )  # fmt: skip
    # 10 entries: 7.5 and 2.5, and of equal remainders the first by name is rounded up
    assert (kept(mask, "lora"), kept(mask, "adapter")) == (7, 3)


def test_within_a_quota_the_largest_scores_are_kept() -> None:
    pool = {"a": torch.tensor([1.0, 3.0, 2.0]), "b": torch.tensor([30.0, 10.0, 20.0])}
    mask = create_mask_from_fisher(pool, 0.5, quotas={"a": 0.67, "b": 0.33})
    assert mask["a"].tolist() == [False, True, True]
    assert mask["b"].tolist() == [True, False, False]


def test_normalized_scores_are_compared_across_types() -> None:
    pool = {"a": torch.tensor([1.0, 3.0, 2.0]), "b": torch.tensor([3000.0, 1000.0, 5000.0]), "c": torch.zeros(2)}
    mask = create_mask_from_fisher(pool, 0.375, normalize="module_type")
    # a / 2, b / 3000: 1.5 and 1.67 lead, then the tie of 1.0
    assert mask["a"][1]
    assert mask["b"][2]
    assert sum(int(selected.sum()) for selected in mask.values()) == 3
    assert not mask["c"].any()


def test_normalization_by_hand() -> None:
    pool = {name: score for name, score in scores().items() if "classifier" not in name}
    means = {
        kind: torch.cat([score.flatten() for name, score in pool.items() if kind in name]).mean()
        for kind in ("lora", "adapter")
    }
    by_hand = {name: score / means["lora" if "lora" in name else "adapter"] for name, score in pool.items()}
    mask, expected = create_mask_from_fisher(pool, 0.3, normalize="module_type"), create_mask_from_fisher(by_hand, 0.3)
    assert all(torch.equal(mask[name], expected[name]) for name in pool)
    assert 0 < kept(mask, "lora") < 19


def test_parts_add_up_exactly() -> None:
    sizes = {f"{kind}.{number}": 1000 + number for kind in "abc" for number in range(4)}
    for budget in range(1, 40):
        assert sum(k for _, k in split_budget(sizes, budget, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})) == budget
        assert sum(k for _, k in split_budget(sizes, budget, "module_type")) == budget


@pytest.mark.parametrize(
    ("quotas", "message"),
    [
        ({"lora": 0.5, "adapter": 0.4}, r"add up to 1; 0\.5 \+ 0\.4 = 0\.9"),
        ({"lora": 1.5, "adapter": -0.5}, "shares from 0 that add up to 1"),
        ({"lora": float("nan"), "adapter": float("nan")}, r"add up to 1; nan \+ nan = nan"),
        ({"lora": 0.5, "prefix": 0.5}, "quotas: 'prefix' matches none of the 4 tensors"),
        ({"lora": 1.0}, r"'layer\.0\.mlp\.adapter_up\.default\.weight' of the pool matches none of 'lora'"),
        ({"lora": 0.5, "layer": 0.5}, "matches more than one: 'lora', 'layer'"),
        ({"lora": 0.1, "adapter": 0.9}, r"'adapter' = 0\.9 of the 32 entries to keep is 29.*have only 24"),
        ("layers", "quotas='layers' is not known; allowed are 'tensor', 'layer', 'module_type'"),
    ],
)
def test_quotas_that_cannot_be_met_are_refused(quotas: dict[str, float], message: str) -> None:
    with pytest.raises(MaskError, match=message):
        create_mask_from_fisher(scores(), 0.5, ["classifier"], quotas=quotas)


def test_unknown_normalization_is_refused() -> None:
    with pytest.raises(MaskError, match="normalize='layer' is not known"):
        create_mask_from_fisher(scores(), 0.5, normalize="layer")  # type: ignore[arg-type]


def test_zero_scores_are_told_within_a_quota() -> None:
    pool = {"a": torch.zeros(4), "b": torch.ones(4)}
    create_mask_from_fisher(pool, 0.5)  # b has enough
    with pytest.warns(FishTuningWarning, match="so 2 are chosen at random"):
        create_mask_from_fisher(pool, 0.5, quotas="module_type")
