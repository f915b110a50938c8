"""The JSON schema of experiment files, against what the reader takes and refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.config_errors import all_keys
from fish_tuning.experiments.config.loading import config_directory, experiments_of, shipped_experiments
from fish_tuning.experiments.config.meanings import MEANINGS
from fish_tuning.experiments.config.schema import experiment_schema
from fish_tuning.experiments.config.training_keys import OWNED
from fish_tuning.experiments.config.yaml_files import parse, read_mapping

SCHEMA = experiment_schema()
VALIDATOR = Draft7Validator(SCHEMA)
FIRST = {"model": {"name": "m"}, "dataset": {"load_args": ["d"]}}


def keys(schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key with its schema, in all the places where a section may stand."""
    if reference := schema.get("$ref"):
        yield from keys(SCHEMA["definitions"][reference.rpartition("/")[2]], prefix)
    for name, field in schema.get("properties", {}).items():
        yield f"{prefix}{name}", field
        yield from keys(field, f"{prefix}{name}.")
    for part in (*schema.get("anyOf", ()), *schema.get("allOf", ()), *([schema["items"]] if "items" in schema else [])):
        yield from keys(part, prefix)


def test_it_is_a_schema() -> None:
    Draft7Validator.check_schema(SCHEMA)


def test_every_key_is_there_and_described() -> None:
    found = list(keys(SCHEMA))
    known = {key for key in all_keys() if key.removeprefix("training.args_override.") not in OWNED}
    names = {key for key, _ in found}
    assert known - names == set()
    assert [key for key, field in found if not field.get("description")] == []
    assert MEANINGS.keys() - names == set()


@pytest.mark.parametrize("path", [*shipped_experiments().values()], ids=lambda path: path.stem)
def test_shipped_experiments_fit(path: Path) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(read_mapping(path))] == []


def test_the_shipped_defaults_fit() -> None:
    base = read_mapping(config_directory() / "base_config.yaml")
    assert [error.message for error in VALIDATOR.iter_errors(base | FIRST)] == []


@pytest.mark.parametrize(
    "text",
    [
        "seeds: 3",
        "peft: [{method: dora}, {method: my_own, name: other, fish_tuning: {score: gain}}]",
        "lora:\nfish_tuning:\ntraining: {args_override: }",
        "lora: {init_lora_weights: pissa_niter_4, target_modules: '.*query'}",
        "lora: {init_lora_weights: false, target_modules: [query]}",
        "fish_tuning: {keep_ratio: 0.5, top_layers: 2, kept_parameters: [3, 4]}",
        "training: {args_override: {learning_rate: 1e-4, eval_strategy: 'no', report_to: [tensorboard]}}",
        "model: {name: m, dtype: '${FISH_TUNING_NO_SUCH:-float16}', device_map: {'': 0}}",
        "dataset: {load_args: d, validation_split: 0.1, metric: accuracy, text_column: [a, b]}",
        "dataset: {data_files: {train: a.csv}, max_train_samples: null}",
    ],
)
def test_what_the_reader_takes_fits(text: str) -> None:
    data = FIRST | parse(text, "the test")
    assert experiments_of(data, "the test")
    assert [error.message for error in VALIDATOR.iter_errors(data)] == []


@pytest.mark.parametrize(
    "text",
    [
        "lora: {fish_rnk: 16}",
        "lora: {fish_rank: 0}",
        "lora: {fish_rank: '16'}",
        "lora: {dropout: 1}",
        "seeds: []",
        "seeds: [a]",
        "model: {dtype: float32}",
        "model: {name: m, dtype: float64}",
        "protocol: fixed_price",
        "peft: {method: LoRA}",
        "training: {args_override: {learning_rat: 1}}",
        "training: {args_override: {seed: 1}}",
        "training: {args_override: {num_train_epochs: many}}",
        "fish_tuning: {granularity: layer}",
        "dataset: {load_args: [d], max_train_samples: 0}",
        "dataset: []",
        "colour: red",
    ],
)
def test_what_it_refuses_the_reader_refuses(text: str) -> None:
    data = FIRST | parse(text, "the test")
    assert not VALIDATOR.is_valid(data)
    with pytest.raises(ConfigurationError):
        experiments_of(data, "the test")
