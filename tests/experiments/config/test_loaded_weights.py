from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import BitsAndBytesConfig

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.loaded_weights import QuantizationConfig

MakeExperiment = Callable[..., ExperimentConfig]
Q = "model.quantization_config"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"{Q}={{load_in_4bit: true, bnb_4bit_quant_tipe: nf4}}", r"Did you mean '.*\.bnb_4bit_quant_type'\?"),
        (f"{Q}={{load_in_4bit: true, load_in_8bit: true}}", "both true; exactly one of them must be true"),
        (f"{Q}={{bnb_4bit_quant_type: nf4}}", "both false; exactly one of them must be true"),
        (f"{Q}={{load_in_8bit: true, bnb_4bit_quant_type: nf4}}", "bnb_4bit_quant_type belongs to load_in_4bit"),
        (f"{Q}={{load_in_4bit: true, llm_int8_threshold: 3}}", "llm_int8_threshold belongs to load_in_8bit"),
        (f"{Q}={{load_in_4bit: true, bnb_4bit_quant_type: nf5}}", "bnb_4bit_quant_type='nf5': must be fp4 or nf4"),
        (f"{Q}=4", "must be a section with the keys load_in_4bit, load_in_8bit"),
        ("model.load_in_4bit=true", r"Did you mean 'model\.quantization_config\.load_in_4bit'\? Keys of model: name,"),
        ("model.device_map=autp", r"'autp' is no device.*Did you mean 'auto'\?"),
        ("model.device_map={'': gpu}", r"'gpu' is no device"),
        ("model.device_map={}", "names no module"),
        ("model.device_map=true", "must be auto, balanced"),
        ("model.max_memory={0: 1GiB}", r"model\.device_map is None"),
    ],
)
def test_what_is_wrong_is_told(experiment: MakeExperiment, override: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        experiment(override)


def test_an_amount_of_memory_is_one(experiment: MakeExperiment) -> None:
    with pytest.raises(ConfigurationError, match="0: 'lots' is no amount of memory"):
        experiment("model.device_map=auto", "model.max_memory={0: lots}")


def test_what_is_read_is_written_and_read_again(experiment: MakeExperiment) -> None:
    for settings in (
        [f"{Q}={{load_in_8bit: true}}", "model.device_map={'': 0, bert: '1'}"],
        [f"{Q}={{load_in_4bit: true}}", "model.device_map=auto", "model.max_memory={0: 20GiB, cpu: 1000}"],
    ):
        config = experiment(*settings)
        assert ExperimentConfig.model_validate(config.model_dump(mode="json")) == config


def test_names_and_defaults_are_those_of_transformers() -> None:
    theirs = BitsAndBytesConfig(load_in_4bit=True).to_dict()
    ours = QuantizationConfig(load_in_4bit=True).model_dump()
    assert {name: theirs[name] for name in ours} == ours
