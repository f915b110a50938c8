"""Regular expressions from outside end, one way or the other."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
from fuzz import settings
from hypothesis import given
from hypothesis import strategies as st
from tiny import bert

from fish_tuning import MaskError
from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.arm_names import Variant
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.methods import PeftMethodConfig
from fish_tuning.experiments.models.peft_methods import peft_config
from fish_tuning.masks.budgets import matching_names
from fish_tuning.patterns import compiled, matching

NAMES = ["bert.encoder.layer.11.attention.self.query.lora_A.default.weight", "a" * 60 + "!", "classifier"]
# Each keeps Python's engine busy for minutes on one of the names.
ENDLESS = [r"(a+)+$", r"(\w+\.?)+$x", r"(.*)*x$", r"(a|a)*b", r"(\w*\.?)*!z", r"^(([a-z])+.)+[A-Z]([a-z])+$"]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_every_pattern_ends(pattern: str) -> None:
    began = time.monotonic()
    try:
        assert isinstance(matching(pattern, NAMES, seconds=1.0), list)
    except ValueError as error:
        assert "takes longer than 1 s" in str(error)  # noqa: PT017
    assert time.monotonic() - began < 5


def test_one_that_does_not_end_is_told() -> None:
    # A reference backwards leaves no engine a way out.
    with pytest.raises(ValueError, match="takes longer than"):
        matching(r"^(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3\4\5\6$", ["ab" * 100 + "c"], seconds=0.2)


@settings()
@given(pattern=st.sampled_from(["query", r"\.1\.", "lora_[AB]", "^bert", "weight$", "(a|b)+", "[a-c]{2,}", "."]))
def test_it_finds_what_pythons_engine_finds(pattern: str) -> None:
    assert matching(pattern, NAMES) == [name for name in NAMES if re.search(pattern, name)]
    assert matching(pattern, NAMES, whole=True) == [name for name in NAMES if re.fullmatch(pattern, name)]


@settings()
@given(text=st.text(alphabet="ab.*+?()[]{}|^$\\\\0123,-:=!<>P", max_size=25))
def test_any_text_is_a_pattern_or_a_value_error(text: str) -> None:
    try:
        compiled(text)
    except ValueError as error:
        assert str(error)  # noqa: PT017


def test_masks_tell_a_wrong_pattern() -> None:
    with pytest.raises(MaskError, match=r"'\(' is no regular expression"):
        matching_names(NAMES, ["("])


def test_targets_by_pattern_reach_peft_as_names(experiment: Callable[..., ExperimentConfig]) -> None:
    config = experiment("lora.target_modules='.*\\.(query|value)'")
    made = peft_config(config, PeftMethodConfig(), bert(), Variant())
    assert all(name.endswith((".query", ".value")) for name in made.target_modules)
    assert len(made.target_modules) == 4


@pytest.mark.parametrize("key", ["lora.target_modules", "peft.args.target_modules"])
def test_targets_that_match_nothing_are_told(key: str, experiment: Callable[..., ExperimentConfig]) -> None:
    config = experiment(f"{key}='nothing'")
    with pytest.raises(ConfigurationError, match=rf"{re.escape(key)}: 'nothing' stands for none of the modules"):
        peft_config(config, config.peft[0], bert(), Variant())


@pytest.mark.parametrize("pattern", ["(((((a?){30}){30}){30}){30}){30}", "((((((a{9,}){0}){9}){9,99}){99}){99}){99}"])
def test_counts_within_counts_are_not_written_out(pattern: str) -> None:
    with pytest.raises(ValueError, match="repeats its parts more than 100,000 times"):
        compiled(pattern)
    assert matching(r"^(\w{1,20}\.){2,9}query\.", NAMES) == NAMES[:1]


@pytest.mark.parametrize(
    "args", ["{rank_pattern: {'(a+)+$': 4}}", "{modules_to_save: ['.*.*.*.*x']}", "{layers_pattern: '(a|a)*b'}"]
)
def test_patterns_that_peft_matches_itself_are_plain(args: str, experiment: Callable[..., ExperimentConfig]) -> None:
    config = experiment(f"peft.args={args}")
    with pytest.raises(ConfigurationError, match="PEFT's engine could take for ever"):
        peft_config(config, config.peft[0], bert(), Variant())
