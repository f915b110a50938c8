"""FSDP in an experiment, as accelerate's configuration or the training arguments ask for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from same_runs import ARMS, BATCH_SIZE, SETTINGS, assert_same_runs, run_alone, trained

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.run import fsdp
from fish_tuning.experiments.run.fsdp import check_fsdp, fsdp_version, load_whole_weights, sharded_by

# accelerate shards on accelerators alone; on a CPU it takes DDP. This has it shard there too.
ON_THE_CPU = """
from engines import fsdp_on_the_cpu

from fish_tuning.experiments.run import fsdp

fsdp.shards_on = lambda device: True
fsdp_on_the_cpu()
"""
ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "num_processes": 2,
    "num_machines": 1,
    "machine_rank": 0,
    "main_process_port": 0,
    "use_cpu": True,
    "mixed_precision": "no",
    "fsdp_config": {  # all else is accelerate's default; so are weights in the first process alone
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "BertLayer",
    },
}


def arguments(**settings: Any) -> Any:
    given = {"fsdp": None, "fsdp_config": None, "deepspeed": None, "load_best_model_at_end": False}
    return SimpleNamespace(**(given | {"device": torch.device("cuda")} | settings))


@pytest.fixture
def launched_with_fsdp(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def set_version(version: str) -> None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", version)
        monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")

    return set_version


def test_accelerate_or_the_arguments_ask_for_it(launched_with_fsdp: Callable[[str], None]) -> None:
    assert fsdp_version(arguments()) is None
    assert fsdp_version(arguments(fsdp=True, fsdp_config={})) == 2
    assert fsdp_version(arguments(fsdp=True, fsdp_config={"version": 1})) == 1
    assert sharded_by(arguments()) == ""
    assert sharded_by(arguments(deepspeed={})) == ""
    assert sharded_by(arguments(deepspeed={"zero_optimization": {"stage": 2}})) == ", with DeepSpeed"
    launched_with_fsdp("2")
    assert fsdp_version(arguments()) == 2
    assert sharded_by(arguments()) == ", sharded by FSDP2"
    launched_with_fsdp("1")
    assert fsdp_version(arguments()) == 1


def test_every_process_loads_the_weights(launched_with_fsdp: Callable[[str], None]) -> None:
    before = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")
    load_whole_weights()
    assert os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == before, "nothing without FSDP"
    launched_with_fsdp("2")
    load_whole_weights()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


@pytest.mark.parametrize(
    ("settings", "changes", "text"),
    [
        ({"fsdp_config": {"version": 1}}, (), r"fsdp \(version 1\): version 1 of FSDP changes the names"),
        ({"device": torch.device("cpu")}, (), r"fsdp \(version 2\): accelerate shards on accelerators alone.*cpu"),
        ({"fsdp_config": {"cpu_ram_efficient_loading": True}}, (), "cpu_ram_efficient_loading=true: all processes"),
        ({}, ("fish_tuning.reselect_every=2",), "reselect_every under FSDP"),
    ],
)
def test_what_cannot_be_is_refused(
    settings: dict[str, Any], changes: tuple[str, ...], text: str, experiment: Callable[..., ExperimentConfig]
) -> None:
    with pytest.raises(ConfigurationError, match=text):
        check_fsdp(arguments(**({"fsdp": True, "fsdp_config": {}} | settings)), experiment(*changes))


def test_all_else_is_not(experiment: Callable[..., ExperimentConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    check_fsdp(arguments(device=torch.device("cpu"), load_best_model_at_end=True), experiment())
    check_fsdp(arguments(fsdp=True, fsdp_config={}, load_best_model_at_end=True), experiment())
    monkeypatch.setattr(fsdp, "shards_on", lambda device: True)
    check_fsdp(arguments(fsdp=True, fsdp_config={}, device=torch.device("cpu")), experiment())


@pytest.mark.slow
def test_what_accelerate_launches_is_that_of_one_process(
    experiment: Callable[..., ExperimentConfig], tmp_path: Path, python_environment: dict[str, str]
) -> None:
    stopping = ["training.args_override.num_train_epochs=3", "training.early_stopping_patience=1"]

    def in_one_process(folder: str, *more: str) -> None:
        run_alone(experiment(*SETTINGS, *more, f"{BATCH_SIZE}12", f"training.output_dir={tmp_path / folder}"))

    in_one_process("one", *stopping)
    in_one_process("whole", stopping[0])

    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(ACCELERATE))
    (tmp_path / "on_the_cpu.py").write_text(ON_THE_CPU)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.yaml")]
    command = [*launcher, "-m", "fish_tuning", "run", str(tmp_path / "small.yaml"), *SETTINGS, *stopping]
    command += [f"{BATCH_SIZE}6", f"training.output_dir={tmp_path / 'two'}"]

    def launched(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, env=python_environment, check=False)

    refused = launched()
    assert refused.returncode != 0
    assert "accelerate shards on accelerators alone" in refused.stderr
    assert not list(tmp_path.glob("two/runs/*")), "before anything is computed"
    sharded = launched("--extension", str(tmp_path / "on_the_cpu.py"))
    assert sharded.returncode == 0, sharded.stderr

    assert_same_runs(tmp_path / "two", tmp_path / "one", "sharded by FSDP2")
    for arm in ARMS:
        stopped, went_on = (trained(tmp_path / folder, arm) for folder in ("one", "whole"))
        assert any(not torch.equal(tensor, went_on[name]) for name, tensor in stopped.items())
