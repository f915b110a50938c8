"""DeepSpeed in an experiment, as accelerate's configuration or the training arguments ask for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from engines import NEEDS_DEEPSPEED, deepspeed_config
from same_runs import BATCH_SIZE, SETTINGS, assert_same_runs, run_alone

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.run.context import _of_accelerate
from fish_tuning.experiments.run.deepspeed import check_deepspeed

# Without what DeepSpeed would compile first, for minutes.
ON_THE_CPU = "from engines import deepspeed_on_the_cpu\n\ndeepspeed_on_the_cpu()\n"
ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "DEEPSPEED",
    "num_processes": 2,
    "num_machines": 1,
    "machine_rank": 0,
    "main_process_port": 0,
    "use_cpu": True,
}


def arguments(**zero: Any) -> Any:
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero}) if zero else None
    return SimpleNamespace(bf16=False, fp16=False, fsdp=None, deepspeed_plugin=plugin)


@pytest.mark.parametrize(
    ("zero", "changes", "text"),
    [
        ({"stage": 2}, ("fish_tuning.reselect_every=2",), "reselect_every under DeepSpeed"),
        ({"stage": 3}, (), "without stage3_gather_16bit_weights_on_model_save"),
    ],
)
def test_what_cannot_be_is_refused(
    zero: dict[str, Any], changes: tuple[str, ...], text: str, experiment: Callable[..., ExperimentConfig]
) -> None:
    with pytest.raises(ConfigurationError, match=text):
        check_deepspeed(arguments(**zero), experiment(*changes))


def test_all_else_is_not(experiment: Callable[..., ExperimentConfig]) -> None:
    check_deepspeed(arguments(), experiment("fish_tuning.reselect_every=2"))
    check_deepspeed(arguments(stage=2), experiment())
    check_deepspeed(arguments(stage=3, stage3_gather_16bit_weights_on_model_save=True), experiment())


def test_a_run_is_known_by_what_the_settings_say() -> None:
    """Not by where their file lies: what clips gradients or chooses an optimizer makes another run."""
    one, same, other = (_of_accelerate(arguments(stage=stage)) for stage in (2, 2, 3))
    assert one == same
    assert one != other
    assert _of_accelerate(arguments()) == {}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("by", ["accelerate", "arguments"])
def test_it_is_that_of_one_process(
    by: str, stage: int, experiment: Callable[..., ExperimentConfig], tmp_path: Path, python_environment: dict[str, str]
) -> None:
    pytest.importorskip("deepspeed", reason=NEEDS_DEEPSPEED)
    given = [*SETTINGS, "training.args_override.num_train_epochs=2", "training.early_stopping_patience=1"]
    run_alone(experiment(*given, f"{BATCH_SIZE}12", f"training.output_dir={tmp_path / 'one'}"))

    settings = tmp_path / "deepspeed.json"
    settings.write_text(
        json.dumps(deepspeed_config(stage) | {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 1.0})
    )
    launched = {"deepspeed_config": {"deepspeed_config_file": str(settings), "zero3_init_flag": stage == 3}}
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(ACCELERATE | launched))
    (tmp_path / "on_the_cpu.py").write_text(ON_THE_CPU)
    launcher, more = {
        "accelerate": (["accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.yaml")], []),
        "arguments": (
            ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
            [f"training.args_override.deepspeed={settings}"],
        ),
    }[by]
    command = [sys.executable, "-m", *launcher, "-m", "fish_tuning", "run", str(tmp_path / "small.yaml"), *given, *more]
    command += [
        f"{BATCH_SIZE}6",
        f"training.output_dir={tmp_path / 'two'}",
        "--extension",
        str(tmp_path / "on_the_cpu.py"),
    ]
    environment = python_environment | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same_runs(tmp_path / "two", tmp_path / "one", "with DeepSpeed")
