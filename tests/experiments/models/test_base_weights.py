from __future__ import annotations

import pytest
from tiny import bert
from torch import nn

from fish_tuning.experiments.models.base_weights import BaseWeights, own_head, settings_of, train_base_weights


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_targets_and_the_head_train_and_nothing_else() -> None:
    settings = BaseWeights(target_modules=["query"], layers_to_transform=[1], modules_to_save=["classifier"])
    model = train_base_weights(bert(), settings)
    query = "bert.encoder.layer.1.attention.self.query"
    assert trained(model) == {f"{query}.weight", f"{query}.bias", "classifier.weight", "classifier.bias"}
    assert settings_of(model) is settings


def test_all_linear_is_every_linear_layer_outside_the_head() -> None:
    model = train_base_weights(bert(), BaseWeights(target_modules="all-linear", modules_to_save=["pooler"]))
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert trained(model) == {f"{name}.{kind}" for name in linear for kind in ("weight", "bias")}


@pytest.mark.parametrize(("targets", "message"), [(["nothing"], "no parameter"), ([""], "no parameter")])
def test_targets_that_name_nothing_are_refused(targets: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_base_weights(bert(), BaseWeights(target_modules=targets))


def test_a_model_without_a_frozen_part_is_refused() -> None:
    with pytest.raises(ValueError, match="hold all of its parameters"):
        train_base_weights(bert(), BaseWeights(target_modules=["bert"], modules_to_save=["classifier"]))


def test_the_head_goes_by_its_own_names_where_peft_does_not_mark_it() -> None:
    assert own_head("lora", {"modules_to_save": ["classifier"]}) is None
    assert own_head("base", {"modules_to_save": ["classifier"]}) == [r"(^|\.)classifier\."]
    assert own_head("base", {"modules_to_save": None}) == []
