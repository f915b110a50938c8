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
from fish_tuning.experiments.config.secrets import keep_names, redacted, remember, scrubbed
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


@pytest.mark.parametrize(
    ("value", "text", "told"),
    [
        ("output", "output_dir, output.", "output_dir, ${PART}."),
        ("333333", "0.333333333 333333 1.333333", "0.333333333 333333 1.333333"),
        ("333333", "jobs/333333/runs, '333333'", "jobs/${PART}/runs, '${PART}'"),
        ("lora-fish", "lora-fish, lora-fish-rand", "lora-fish, lora-fish-rand"),
        ("fish-rand", "lora-fish-rand and fish-rand", "lora-fish-rand and ${PART}"),
    ],
)
def test_keys_numbers_and_arms_stay_in_texts(value: str, text: str, told: str) -> None:
    remember("PART", value)
    keep_names(["lora-fish", "lora-fish-rand"])
    assert scrubbed(text) == told


def test_secrets_are_found_within_words_too() -> None:
    remember("MY_TOKEN", "333333")
    assert scrubbed("x333333y") == "x${MY_TOKEN}y"


def test_data_keep_keys_and_numbers() -> None:
    remember("OUT", "output")
    remember("JOB", "333333")
    data = {"output_dir": "output", "value": 0.333333, "id": "333333"}
    assert redacted(data) == {"output_dir": "${OUT}", "value": 0.333333, "id": "${JOB}"}


def test_a_text_is_known_by_more_than_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB", "333333")
    config = load_experiment("digits", ["training.output_dir=jobs/a_${JOB}"])
    assert redacted(config.model_dump())["training"]["output_dir"] == "jobs/a_${JOB}"


def test_no_method_is_called_by_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "hidden1")
    with pytest.raises(ConfigurationError, match="named like a secret") as error:
        load_experiment("digits", ["peft=[{name: '${MY_TOKEN}', method: lora}]"])
    assert "hidden1" not in str(error.value)


def test_files_stay_whole_whatever_the_environment_holds(
    experiment: Callable[..., ExperimentConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "output"))
    monkeypatch.setenv("EXP_NAME", "lora-fish")
    monkeypatch.setenv("RATE", "accuracy")  # a metric's name
    monkeypatch.setenv("PART", "output")  # of a key
    config = experiment(
        "training.output_dir=${OUT}/${PART}/${RATE}",
        "name=${EXP_NAME}",
        "fish_tuning.methods_to_run=[lora, lora-fish]",
        "seeds=[1]",
    )
    run_experiment(config, plan_experiment(config))
    folder = tmp_path / "output" / "output" / "accuracy"
    results = json.loads((folder / "results.json").read_text())
    assert [run["arm"] for run in results["runs"]] == ["lora", "lora-fish"] == results["facts"]["arms"]
    assert results["config"]["training"]["output_dir"] == "${OUT}/${PART}/${RATE}"
    assert results["facts"]["metric"] == "accuracy"
    assert "| lora-fish |" in (folder / "results.md").read_text()
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.glob("results.*"))
