"""Registries, and the table of PEFT methods that is one."""

from __future__ import annotations

import pytest
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from fish_tuning import MaskError, PeftMethod, register_peft_method
from fish_tuning.errors import ConfigurationError
from fish_tuning.peft_methods import PEFT_METHODS, peft_method, refusal
from fish_tuning.registry import Registry


def test_members_are_found_by_name() -> None:
    numbers: Registry[int] = Registry("number")
    assert numbers.register("one")(1) == 1
    assert dict(numbers) == {"one": 1}
    assert numbers.find("one") == 1
    numbers.register("one")(11)
    assert numbers["one"] == 11
    assert len(numbers) == 1


def test_an_unknown_name_is_told_with_the_known_ones() -> None:
    numbers: Registry[int] = Registry("number")
    numbers.register("seven")(7)
    with pytest.raises(ConfigurationError, match=r"number='sevn' is not known; allowed are 'seven'. Did you mean"):
        numbers.find("sevn")
    with pytest.raises(MaskError, match=r"^keep='x'"):
        numbers.find("x", "keep", MaskError)


def test_tuners_in_the_table_are_pefts() -> None:
    tuners = {tuner.__name__ for tuner in PEFT_TYPE_TO_TUNER_MAPPING.values()}
    assert {method.tuner for method in PEFT_METHODS.values() if method.tuner} <= tuners


def test_refusals_name_the_way_out() -> None:
    assert "Use LoRA" in (refusal({"AdaLoraModel", "Linear"}, "masked") or "")
    assert refusal({"AdaLoraModel"}, "scored") is None
    assert refusal({"LoraModel"}, "masked") is None


def test_a_method_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PEFT_METHODS, "_members", dict(PEFT_METHODS))
    assert peft_method("mine") == PeftMethod()
    register_peft_method("mine", PeftMethod("LORA", starts_away_from_zero=True))
    assert peft_method("mine").starts_away_from_zero
