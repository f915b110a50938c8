"""Whatever has become of the files of an experiment: the report is written, or one error says why not."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import fuzz
import pytest
from fakes import kept, scores
from hypothesis import given
from hypothesis import strategies as st
from page_records import config, write_experiment

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.report.page.load import read_experiments
from fish_tuning.experiments.report.page.results import join_results
from fish_tuning.experiments.report.page.texts import csv_text, latex_text, markdown_text

VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


def told(folder: Path) -> None:
    with suppress(ConfigurationError):
        experiments, notes = read_experiments([folder])
        results = join_results(experiments)
        assert markdown_text(results, notes)
        assert latex_text(results)
        assert csv_text(results)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs = [*scores("lora", [0.5, 0.6, 0.7]), *scores("lora-fish", [0.6, 0.7, 0.85], kept=kept(1, 9))]
    return write_experiment(tmp_path / "a", runs, settings=config("t", ["lora", "lora-fish"], [1, 2, 3]), task="rte")


@pytest.mark.parametrize("name", ["results.json", "runs"])
def test_any_damage_of_bytes(name: str, folder: Path) -> None:
    file = folder / name if name == "results.json" else sorted((folder / "runs").iterdir())[0]
    whole = file.read_bytes()

    @fuzz.settings()
    @given(damage=fuzz.damages)
    def test(damage: fuzz.Damage) -> None:
        file.write_bytes(fuzz.damaged(whole, damage))
        told(folder)

    test()


def test_any_value_of_any_field(folder: Path) -> None:
    file = sorted((folder / "runs").iterdir())[0]
    record = json.loads(file.read_text())

    @fuzz.settings(max_examples=150)
    @given(field=st.sampled_from(sorted(record)), value=VALUES)
    def test(field: str, value: Any) -> None:
        file.write_text(json.dumps(record | {field: value}))
        told(folder)

    test()


def test_any_value_in_results_json(folder: Path) -> None:
    file = folder / "results.json"
    content = json.loads(file.read_text())

    @fuzz.settings(max_examples=100)
    @given(field=st.sampled_from(sorted(content)), value=VALUES)
    def test(field: str, value: Any) -> None:
        file.write_text(json.dumps(content | {field: value}))
        told(folder)

    test()
