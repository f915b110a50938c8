"""Secrets: values of the environment and what is named like one are in no file and no message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fish_tuning.cli import app
from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config import secrets
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.loading import load_experiment
from fish_tuning.experiments.config.secrets import redacted, remember, scrubbed
from fish_tuning.experiments.report.page import write_page
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.runner import run_experiment

SECRET = "hf_abcdefghijklmnop"


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_values", {})


def test_no_file_of_a_run_holds_them(
    experiment: Callable[..., ExperimentConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_HF_TOKEN", SECRET)
    monkeypatch.setenv("MY_FOLDER", str(tmp_path / "out"))
    config = experiment(
        "training.args_override.hub_token=${MY_HF_TOKEN}",
        "training.output_dir=${MY_FOLDER}/results",
        "fish_tuning.methods_to_run=[lora, lora-fish]",
        "name=with ${MY_HF_TOKEN}",
    )
    assert config.training.args_override["hub_token"] == SECRET  # the run itself has the real one
    assert all(run.status == "ok" for run in run_experiment(config, plan_experiment(config)))
    folder = tmp_path / "out" / "results"
    write_page([folder])
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 10
    for path in written:
        assert SECRET.encode() not in path.read_bytes(), path
    assert "with ${MY_HF_TOKEN}" in (folder / "results.json").read_text()


def test_no_message_holds_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_HF_TOKEN", SECRET)
    file = tmp_path / "x.yaml"
    file.write_text("model: {name: m}\ndataset: {load_args: ['./no/${MY_HF_TOKEN}'], task: '${MY_HF_TOKEN}'}\n")
    with pytest.raises(ConfigurationError) as error:
        load_experiment(file)
    assert SECRET not in str(error.value)
    result = CliRunner().invoke(app, ["run", str(file), "dataset.task=null"])
    assert result.exit_code == 2
    assert SECRET not in result.output


def test_what_is_named_like_a_secret_is_hidden() -> None:
    data = {"hub_token": "abc", "pad_token": "[PAD]", "max_new_tokens": 3, "deep": [{"password": "p", "api_key": ""}]}
    hidden = {"hub_token": "***", "pad_token": "[PAD]", "max_new_tokens": 3}
    assert redacted(data) == {**hidden, "deep": [{"password": "***", "api_key": ""}]}


def test_short_values_destroy_no_text() -> None:
    remember("SEED", "1")
    remember("MY_TOKEN", "abc")
    remember("PART", "secret-part")
    remember("WHOLE", "secret-part-and-more")
    assert scrubbed("seed 1, abc, secret-part-and-more") == "seed 1, ${MY_TOKEN}, ${WHOLE}"


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.args_override.hub_token=hf_written_out", "lora.fish_rnk=1"],
        ["training.args_override.hub_token=[hf_written_out"],
        ["lora.token=hf_written_out"],
        ["lora.token={a: ${MY_HF_TOKEN}}"],
        ["model.dtype=${MY_HF_TOKEN}"],
    ],
)
def test_no_message_of_an_override_holds_one(monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> None:
    monkeypatch.setenv("MY_HF_TOKEN", SECRET)
    with pytest.raises(ConfigurationError) as error:
        load_experiment("digits", overrides)
    assert "hf_" not in str(error.value)
    assert error.value.__cause__ is None or "hf_" not in str(error.value.__cause__)


def test_what_is_written_out_is_found_in_texts_too() -> None:
    config = load_experiment(
        "digits", ["training.args_override.hub_token=hf_written_out", "model.config_overrides={password: 123456}"]
    )
    assert config.training.args_override["hub_token"] == "hf_written_out"
    assert scrubbed("401 for hf_written_out") == "401 for ***"
    assert redacted(config.model_dump())["model"]["config_overrides"] == {"password": "***"}


def test_quoted_forms_are_found() -> None:
    value = "it's \"quoted\\ and ümlauts"
    remember("PART", value)
    for text in (value, repr(value), json.dumps(value)):
        assert scrubbed(text).strip("'\"") == "${PART}"


def test_names_of_ours_stay_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARM", "lora-fish")
    stored = redacted(load_experiment("digits", ["fish_tuning.methods_to_run=['${ARM}']"]).model_dump())
    assert ExperimentConfig.model_validate(stored).arms == ["lora-fish"]


def test_a_value_that_is_another_variables_name_is_replaced_once() -> None:
    remember("A", "HF_TOKEN")
    remember("HF_TOKEN", SECRET)
    assert scrubbed(f"{SECRET} HF_TOKEN") == "${HF_TOKEN} ${A}"
