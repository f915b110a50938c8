"""Adapters whose names PEFT would lose parts of a head by are refused before anything is trained or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import assert_same_tensors, bert, random_mask, tensors
from torch import Tensor, nn

from fish_tuning import FishTuningWarning, MaskError, apply_mask, complete_adapter, is_masked, save_compact_adapter

TOLD = r"An adapter cannot be called '{}' here: .*{}', is called so too.* Give the adapter another name"


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.out_proj = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.out_proj(self.dense(hidden))
        return logits


def config(**settings: Any) -> LoraConfig:
    given = {"r": 4, "target_modules": ["query"], "task_type": "SEQ_CLS", "init_lora_weights": False} | settings
    return LoraConfig(**given)


def named(name: str, head: nn.Module | None = None, **settings: Any) -> Any:
    base = bert()
    if head is not None:
        base.classifier = head
    return get_peft_model(base, config(**settings), adapter_name=name)


@pytest.mark.parametrize(
    ("name", "head", "lost"),
    [
        ("weight", None, "classifier.weight"), ("bias", None, "classifier.bias"),
        ("dense", TwoLayers(), "classifier.dense.weight"), ("out_proj", TwoLayers(), "classifier.out_proj.weight"),
    ],
)  # fmt: skip
def test_the_name_of_a_part_of_the_head(name: str, head: nn.Module | None, lost: str, tmp_path: Path) -> None:
    model = named(name, head)
    before = tensors(model)
    for mask in (random_mask(model), {k: m for k, m in random_mask(model).items() if "lora" in k}):
        with pytest.raises(MaskError, match=TOLD.format(name, lost)):
            apply_mask(model, mask)
    assert not is_masked(model)
    assert_same_tensors(tensors(model), before)
    with pytest.raises(MaskError, match=TOLD.format(name, lost)):
        save_compact_adapter(model, tmp_path / "compact", adapter_name=name)
    assert not (tmp_path / "compact").exists()
    model.save_pretrained(tmp_path)
    with pytest.warns(FishTuningWarning, match=TOLD.format(name, lost)):
        complete_adapter(model, tmp_path / name, name)
    with pytest.raises(KeyError, match=r"classifier"):  # why: PEFT itself cannot load what it has written
        PeftModel.from_pretrained(model.get_base_model(), tmp_path / name)


def test_trained_biases_are_saved_without_the_adapters_name_too(tmp_path: Path) -> None:
    model = named("dense", bias="all")
    with pytest.raises(MaskError, match=TOLD.format("dense", "dense.bias")):
        apply_mask(model, random_mask(model))
    model = named("dense", bias="lora_only")  # the queries' alone
    apply_mask(model, random_mask(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "dense", "dense")
    theirs = tensors(loaded)
    assert_same_tensors({name: t for name, t in tensors(model).items() if name in theirs}, theirs)


def test_an_idle_adapter_of_such_a_name_is_not_saved_beside_the_masked_one(tmp_path: Path) -> None:
    model = named("default")
    apply_mask(model, random_mask(model, dense=["classifier"]))
    model.add_adapter("weight", config())
    with pytest.raises(MaskError, match=TOLD.format("weight", "classifier.weight")):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.delete_adapter("weight")
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(bert(), tmp_path)


def test_without_a_head_the_name_is_as_good_as_any() -> None:
    model = named("weight", task_type="FEATURE_EXTRACTION")
    apply_mask(model, random_mask(model))
    assert is_masked(model)
