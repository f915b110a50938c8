"""Which modules are adapted, and which are the head."""

from __future__ import annotations

import pytest
from tiny import bert, llama_classifier, vit

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.models.targets import head_names, target_modules


def test_targets_are_found_by_family() -> None:
    assert target_modules(None, bert()) == ["query", "key", "value"]
    assert target_modules(None, vit()) == ["q_proj", "k_proj", "v_proj"]
    assert target_modules(None, llama_classifier()) == ["q_proj", "k_proj", "v_proj"]
    assert target_modules(["o_proj"], llama_classifier()) == ["o_proj"]
    assert target_modules(".*o_proj", llama_classifier()) == ".*o_proj"


def test_an_unknown_target_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"no module 'querry'; .*Did you mean 'query'\?"):
        target_modules(["querry"], bert())


def test_the_head_is_what_the_task_brings() -> None:
    assert head_names(bert()) == ["classifier"]
    assert head_names(llama_classifier()) == ["score"]
