"""A masked model goes when nobody holds it, as an unmasked one does; base models do not wait for the collector."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import bert, classification_batch, lora, random_mask
from torch import nn

from fish_tuning import apply_mask, is_masked


@pytest.fixture
def without_the_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def masked(model: Any) -> Any:
    apply_mask(model, random_mask(model, 0.5))
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "adapter": lambda: masked(lora(bert())),
    "whole model": lambda: masked(bert()),
    "in parameter dicts": lambda: masked(get_peft_model(bert(), LoraConfig(target_modules=["word_embeddings"]))),
    "deepcopy": lambda: copy.deepcopy(masked(lora(bert()))),
    "pickle": lambda: pickle.loads(pickle.dumps(masked(lora(bert())))),
}


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.usefixtures("without_the_collector")
def test_a_model_that_nobody_holds_is_gone(make: str) -> None:
    model = MODELS[make]()
    assert is_masked(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(**{k: v for k, v in classification_batch().items() if k != "labels"})[0].sum().backward()
    optimizer.step()
    model.state_dict()
    held = [weakref.ref(each) for each in (model, *model.parameters(), *model.modules())]
    del model, optimizer
    assert [each() for each in held if each() is not None] == []


def test_methods_of_a_model_that_nobody_else_holds(tmp_path: Path) -> None:
    MODELS["adapter"]().save_pretrained(tmp_path)
    assert (tmp_path / "fish_mask.safetensors").is_file()
    assert not is_masked(MODELS["adapter"]().merge_and_unload())


@pytest.mark.usefixtures("without_the_collector")
def test_a_group_lasts_as_long_as_one_of_its_modules() -> None:
    model = masked(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    last, gone = model[1], weakref.ref(model[0])
    before = last(torch.ones(1, 3))
    del model
    assert gone() is None
    torch.optim.SGD(last.parameters(), lr=1.0)
    last(torch.ones(1, 3)).sum().backward()
    torch.optim.SGD(last.parameters(), lr=1.0).step()
    assert not torch.equal(last(torch.ones(1, 3)), before)
