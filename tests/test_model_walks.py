"""Quick walks through a model give what torch's own give."""

from __future__ import annotations

import pytest
import torch
from tiny import bert, llama, lora, random_mask
from torch import nn

from fish_tuning import apply_mask
from fish_tuning.model_walks import (
    every_module,
    every_parameter,
    every_tensor,
    in_one_memory,
    named_parameters,
    walked_once,
)


def shared() -> nn.Module:
    """A module in two places, a tensor in two modules, an empty place, buffers."""
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"one": nn.Sequential(layer, nn.BatchNorm1d(2)), "two": nn.Linear(2, 2), "again": layer})
    model["two"].weight = layer.weight  # type: ignore[assignment]
    model.register_module("empty", None)
    return model


def masked() -> nn.Module:
    model = lora(bert())
    apply_mask(model, random_mask(model))
    return model


@pytest.mark.parametrize("make", [shared, lambda: lora(llama(tie_word_embeddings=True)), masked, nn.Identity])
def test_they_give_what_torchs_walks_give(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    assert every_module(model) == list(model.modules())
    assert list(map(id, every_parameter(model))) == list(map(id, model.parameters()))
    assert {*map(id, every_tensor(model))} == {*map(id, model.parameters()), *map(id, model.buffers())}
    names = named_parameters(model)
    assert list(names) == [name for name, _ in model.named_parameters()]
    assert list(map(id, names.values())) == list(map(id, model.parameters()))


def test_one_walk_serves_all_who_ask_for_that_model() -> None:
    model, other = shared(), nn.Linear(2, 2)
    with walked_once(model):
        modules = every_module(model)
        model.register_module("late", nn.Identity())
        every_module(model).clear()
        assert every_module(model) == modules
        assert every_module(other) == [other]
        with walked_once(other):
            assert every_module(other) == [other]
    assert every_module(model) == list(model.modules()) != modules


def test_tensors_of_one_memory() -> None:
    memory, freed = torch.zeros(24), [torch.zeros(3), torch.zeros(3)]
    for each in freed:
        each.untyped_storage().resize_(0)
    tensors = {
        "all": memory[:12], "turned": memory[:12].view(3, 4).T, "part": memory[10:13], "beside": memory[13:20],
        "with gaps": memory[1::2], "elsewhere": torch.zeros(24), "none": memory[:0],
        "meta": torch.zeros(3, device="meta"), "freed": freed[0], "freed too": freed[1],
    }  # fmt: skip
    found = in_one_memory(tensors)
    assert set(found) == {"all", "part", "turned"}
    assert all(sorted(names) == ["all", "part", "turned"] for names in found.values())
