"""The command `fish-tuning plan`: what it prints, and wrong use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fish_tuning.cli import app
from fish_tuning.experiments.config.experiment import ExperimentConfig

Experiment = Callable[..., ExperimentConfig]


@pytest.fixture
def file(experiment: Experiment, tmp_path: Path) -> str:
    experiment()  # writes it
    return str(tmp_path / "small.yaml")


def plan(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["plan", *arguments], catch_exceptions=False)


def test_tables_fit_into_80_columns(file: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = plan(file, "fish_tuning.methods_to_run=[lora,lora-fish,head]", "--devices", "1,2,4,8,16,64")
    assert done.exit_code == 0
    tables = done.stdout.partition("note: ")[0].splitlines()
    for text in ("small: what each arm needs", "lora-fish: a device (cpu, ddp)", "peak of all ~", "of 64"):
        assert any(text in line for line in tables), text
    assert max(len(line.rstrip()) for line in tables) <= 80
    assert "note: Exact: parameters" in done.stdout
    assert "input_ids 16x" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written


def test_json_has_all_in_bytes(file: str) -> None:
    done = plan(file, "--json", "--devices", "2", "--strategy", "zero2", "fish_tuning.methods_to_run=[lora-fish]")
    (found,) = json.loads(done.stdout)
    (arm,) = found["arms"]
    (device,) = arm["devices"]
    assert (found["strategy"], found["kind"], device["devices"]) == ("zero2", "cpu", 2)
    assert device["peak"] > device["weights"] + device["optimizer"] > 0
    assert arm["files"]["adapter"] > arm["files"]["mask"] > 0
    assert arm["optimizer"] > device["optimizer"]
    assert arm["calibration_peak"] > arm["scores"] > 0


def test_json_is_all_that_stands_on_standard_output(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fish_tuning.experiments.run import plan as planning

    def prints(*arguments: object) -> object:
        print("a library's remark")  # noqa: T201
        return real(*arguments)

    real = planning.load_task
    monkeypatch.setattr(planning, "load_task", prints)
    done = plan(file, "--json", "fish_tuning.methods_to_run=[lora]")
    assert json.loads(done.stdout)[0]["strategy"] == "ddp"
    assert "a library's remark" in done.stderr
    assert "a library's remark" in plan(file, "fish_tuning.methods_to_run=[lora]").stdout
    wrong = plan(file, "--json", "--tokens", "0")
    assert (wrong.exit_code, wrong.stdout) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devices", "two"], "--devices two: must be whole numbers from 1"),
        (["--strategy", "ddpp"], "--strategy ddpp: allowed are ddp, fsdp, zero2, zero3"),
        (["--on", "tpu"], "--on tpu: allowed are cpu, cuda"),
        (["--tokens", "0"], "--tokens 0"),
        (["lora.fish_rnk=2"], "lora.fish_rank"),
        (["model.name=/nowhere/at/all"], "there is no folder"),
        (["training.args_override.per_device_train_batch_size=0"], "per_device_train_batch_size"),
        (["--extension", "no_such_module"], "no_such_module"),
        (["model.config_overrides._attn_implementation=flash_attention_2"], "a package is missing: FlashAttention2"),
    ],
)
def test_wrong_use_is_exit_code_2(file: str, arguments: list[str], said: str) -> None:
    done = plan(file, *arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize("options", [["--dry-run"], []])
def test_run_tells_of_a_missing_package_too(file: str, options: list[str]) -> None:
    override = "model.config_overrides._attn_implementation=flash_attention_2"
    done = CliRunner().invoke(app, ["run", file, override, *options], catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (2, "")
    # Whoever reads the data first in a process sees the bar of `datasets`.
    (told,) = [line for line in done.stderr.splitlines() if line and not line.startswith("Generating ")]
    assert told.startswith("error: model.name: no model can be made")
    assert "a package is missing: FlashAttention2" in told


def test_what_is_assumed_is_told(file: str) -> None:
    done = plan(file, "training.args_override.optim=adafactor", "training.args_override.gradient_accumulation_steps=4")
    assert done.exit_code == 0
    assert "note: optim=adafactor: 1 number an entry at most is assumed." in done.stdout
    assert "note: Gradients are accumulated over 4 batches." in done.stdout


def test_a_missing_file_is_exit_code_2() -> None:
    done = plan("no_such_file.yaml")
    assert done.exit_code == 2
    assert "Traceback" not in done.output


def test_pictures_have_no_tokens() -> None:
    done = plan("digits", "--tokens", "9")
    assert done.exit_code == 2
    assert "--tokens 9: digits is image classification" in done.stderr
