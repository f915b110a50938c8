"""What is said of an experiment's arms, against arms that are really built, trained for a step and saved."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import write_llama, write_llama_config, write_sums
from transformers import TrainerCallback

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.loading import load_experiment
from fish_tuning.experiments.costs.arm_costs import spread
from fish_tuning.experiments.costs.experiment_costs import ArmCosts, experiment_costs, parse_devices, plannable
from fish_tuning.experiments.costs.kernels import matmul_workspace
from fish_tuning.experiments.run.arm import choose_mask, needs_scores, save
from fish_tuning.experiments.run.calibration import calibrate
from fish_tuning.experiments.run.context import make_context
from fish_tuning.experiments.run.measure import optimizer_state_bytes
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.trainers import make_trainer
from fish_tuning.sparse.masked_tensors import masked_tensors
from fish_tuning.training.trainer import FishMaskCallback

Experiment = Callable[..., ExperimentConfig]


def costs_of(config: ExperimentConfig, **options: Any) -> dict[str, ArmCosts]:
    return {arm.arm: arm for arm in experiment_costs(config, plan_experiment(config), **options).arms}


def built(config: ExperimentConfig, name: str, folder: Path) -> dict[str, Any]:
    """An arm's sizes once it has been trained for a step, saved, and written as a checkpoint."""
    plan = plan_experiment(config)
    arm = next(arm for arm in plan.arms if arm.arm == name)
    context = make_context(config, plan, TrainerCallback())
    args = context.arguments(arm, 1, extra={"max_steps": 1, "save_strategy": "steps", "save_steps": 1})
    model = context.starts(arm.arm, 1, args.device)
    scores = calibrate(context, arm, 1, model, args, "") if needs_scores(arm) else None
    mask = choose_mask(context, arm, 1, model, scores)
    trainer = make_trainer(context, arm, model, args, [] if mask is None else [FishMaskCallback(mask)])
    trainer.train()
    held: list[Any] = [*model.parameters(), *model.buffers()]
    for tensor in masked_tensors(model):
        held += [tensor.masked.frozen, *(tensor.masked.group.joined or [tensor.masked.index])]
    memories = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    save(model, mask, folder)
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    written = next(Path(args.output_dir).glob("checkpoint-1"))
    checkpoint = [*written.glob("*.safetensors"), written / "optimizer.pt"]
    return {
        "empty": sum(tensor.masked.values is None for tensor in masked_tensors(model)),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "weights": sum(memories.values()),
        "optimizer": optimizer_state_bytes(trainer.optimizer),
        "adapter": files.get("adapter_model.safetensors", files.get("delta.safetensors")),
        "mask": files.get("fish_mask.safetensors"),
        "checkpoint": sum(path.stat().st_size for path in checkpoint),
        "scores": None if scores is None else sum(each.nbytes for each in scores.scores.values()),
    }


BASE = "peft=[{method: base, args: {target_modules: [query, value]}}]"
EXACT = [
    ("lora", []),
    ("lora-fish", []),
    ("lora-fish", ["model.dtype=bfloat16"]),
    ("lora-fish-rand", ["training.args_override.bf16=true"]),
    ("head", []),
    ("base", [BASE]),
    ("base-fish", [BASE]),
    ("prefix_tuning", ["peft=[{method: prefix_tuning, args: {num_virtual_tokens: 4}}]"]),
    ("ia3", ["peft=[{method: ia3}]"]),
    ("lora-fish", ["fish_tuning.prune_to_ratio_of_baseline=1.0", "lora.fish_rank=2"]),  # the whole pool
]


@pytest.mark.slow
@pytest.mark.parametrize(("arm", "changes"), EXACT)
def test_what_is_called_exact_is(experiment: Experiment, tmp_path: Path, arm: str, changes: list[str]) -> None:
    config = experiment(*changes)
    said, real = costs_of(config, devices=[1])[arm], built(config, arm, tmp_path / "saved")
    assert said.trainable_parameters == real["trainable"]
    assert said.files.mask == real["mask"]
    assert said.scores == real["scores"]
    # Where the entries are is known once they are scored. A tensor that gets none keeps no step and no group, and is
    # not in a delta.
    empty = real["empty"]
    assert said.weights == pytest.approx(real["weights"], rel=0.01 if empty else 0, abs=0)
    assert said.optimizer - 4 * empty == real["optimizer"]
    assert said.gradients == 4 * said.trainable_parameters or "bfloat16" in str(changes)
    if arm == "base-fish":
        assert said.files.adapter == pytest.approx(real["adapter"], abs=8 + 600 * empty)
    else:
        assert said.files.adapter == real["adapter"]
    assert said.files.checkpoint == pytest.approx(real["checkpoint"] + 3 * 68 * empty, rel=0.02, abs=1000)


def test_arms_of_the_same_size_are_said_to_need_the_same(experiment: Experiment) -> None:
    costs = costs_of(experiment())
    assert costs["lora-fish"].devices == costs["lora-fish-rev"].devices == costs["lora-fish-rand"].devices
    assert costs["lora-fish"].calibration_peak is not None
    assert costs["lora-fish-rand"].calibration_peak is None
    assert costs["lora"].scores is None
    assert costs["lora-fish"].positions >= 4 * (costs["lora-fish"].trainable_parameters - 100)
    assert costs["lora"].positions == 0


def test_batch_length_and_recomputation_count(experiment: Experiment) -> None:
    def activations(*changes: str, **options: Any) -> int:
        found = costs_of(experiment("fish_tuning.methods_to_run=[lora]", *changes), devices=[1], **options)
        return found["lora"].activations or 0

    plain = activations()
    assert activations("training.args_override.per_device_train_batch_size=32") > 1.9 * plain
    assert activations(tokens=100) > 4 * plain
    assert activations("training.args_override.activation_checkpointing=true") < 0.8 * plain
    accumulated = costs_of(experiment("training.args_override.gradient_accumulation_steps=4"), devices=[1])["lora"]
    device = accumulated.devices[0]
    assert device.peak == accumulated.weights + accumulated.optimizer + plain + accumulated.gradients


def test_answers_are_planned_with_the_head_of_their_trainer(tmp_path: Path) -> None:
    file = tmp_path / "sums.yaml"
    model, data = write_llama(tmp_path / "llama"), write_sums(tmp_path / "sums")
    settings = {
        "model": {"name": str(model)},
        "dataset": {"load_args": [str(data)]},
        "fish_tuning": {"num_samples": 8},
        "training": {"args_override": {"use_cpu": True}, "output_dir": str(tmp_path / "out")},
    }
    file.write_text(json.dumps(settings))
    costs = costs_of(load_experiment(file, []))
    assert set(costs) == {"lora", "lora-fish", "lora-fish-rand", "lora-fish-rev"}
    assert all(arm.activations for arm in costs.values())


BIG = """
import json, resource, sys, time
from fish_tuning.experiments.config.loading import load_experiment
from fish_tuning.experiments.costs.experiment_costs import experiment_costs, plannable
from fish_tuning.experiments.run.plan import plan_experiment
config = plannable(load_experiment(sys.argv[1], []), "cuda")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
costs = experiment_costs(config, plan_experiment(config), kind="cuda", tokens=2048, strategy="fsdp", devices=[1, 8])
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"seconds": time.process_time() - start, "kB": used, "costs": costs.to_dict()}))
"""


@pytest.mark.slow
def test_a_70_billion_llama_is_planned_in_seconds_without_memory(
    tmp_path: Path, python_environment: dict[str, str]
) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    model = write_llama_config(tmp_path / "llama", **sizes, num_key_value_heads=8, vocab_size=128256)
    file = tmp_path / "big.yaml"
    half = {"bf16": True, "per_device_train_batch_size": 1, "activation_checkpointing": True}
    settings = {
        "model": {"name": str(model), "dtype": "bfloat16"},
        "dataset": {"load_args": [str(write_sums(tmp_path / "sums"))]},
        "fish_tuning": {"num_samples": 8, "methods_to_run": ["lora-fish"]},
        "training": {"args_override": half, "output_dir": str(tmp_path / "out")},
    }
    file.write_text(json.dumps(settings))
    command = [sys.executable, "-c", BIG, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=python_environment)
    found = json.loads(done.stdout.splitlines()[-1])
    (arm,) = found["costs"]["arms"]
    assert found["seconds"] < 60
    assert found["kB"] < 1.5e6  # libraries that are imported meanwhile
    whole, shared = arm["devices"]
    assert 141e9 < whole["weights"] < 142e9
    assert whole["peak"] > whole["weights"] + whole["activations"]
    assert shared["peak"] < whole["peak"] / 3
    assert not any("traced" in note for note in found["costs"]["notes"])


def test_what_cannot_be_traced_is_told_and_the_rest_is_there(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import BertModel

    def forward(*_: Any, **__: Any) -> Any:
        return torch.ones(2) + torch.ones(3)

    monkeypatch.setattr(BertModel, "forward", forward)
    config = experiment()
    costs = experiment_costs(config, plan_experiment(config), devices=[2])
    arm = next(arm for arm in costs.arms if arm.arm == "lora-fish")
    assert arm.activations is None
    assert arm.devices[0].peak is None
    assert arm.devices[0].traffic > 0
    assert arm.files.mask
    assert any("lora-fish: activations could not be traced" in note for note in costs.notes)
    assert not caplog.records
    json.dumps(costs.to_dict())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": "pipe"}, "--strategy pipe: allowed are ddp, fsdp, zero2, zero3"),
        ({"kind": "tpu"}, "--on tpu: allowed are cpu, cuda"),
        ({"devices": []}, "--devices"),
        ({"devices": [0]}, "--devices"),
        ({"tokens": 0}, "--tokens 0"),
        ({"tokens": 129}, "--tokens 129: .* has 128 positions"),
    ],
)
def test_wrong_options(experiment: Experiment, options: dict[str, Any], said: str) -> None:
    config = experiment()
    with pytest.raises(ConfigurationError, match=said):
        experiment_costs(config, plan_experiment(config), **options)


def test_devices_are_read() -> None:
    assert parse_devices("1, 8,8") == [1, 8]
    for wrong in ("", "a", "0", "1,", "-1", "1.5", "²"):
        with pytest.raises(ConfigurationError, match="--devices"):
            parse_devices(wrong)


def test_a_gpu_is_planned_for_where_there_is_none(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    config = experiment(
        "training.args_override={fp16: true, tf32: true, num_train_epochs: 1, per_device_train_batch_size: 16}",
        "fish_tuning.methods_to_run=[lora]",
    )
    with pytest.raises(ConfigurationError):
        plan_experiment(config)
    half = costs_of(plannable(config, "cuda"), kind="cuda", devices=[1])["lora"]
    full = costs_of(experiment("fish_tuning.methods_to_run=[lora]"), kind="cuda", devices=[1])["lora"]
    assert half.activations is not None
    assert half.activations < (full.activations or 0)
    assert half.devices[0].peak is not None
    assert half.devices[0].peak > matmul_workspace() + half.weights
    assert plannable(config, "cpu") is config


@pytest.mark.parametrize("place", ["cuda:1", "{bert: 0, classifier: 1}"])
def test_a_map_of_gpus_is_planned_for_where_there_are_none(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    lora = "fish_tuning.methods_to_run=[lora]"
    plain, mapped = experiment(lora), experiment(lora, f"model.device_map={place}")
    with pytest.raises(ConfigurationError, match="0 GPUs can be seen"):
        plan_experiment(mapped)
    assert costs_of(plannable(mapped, "cuda"), kind="cuda") == costs_of(plannable(plain, "cuda"), kind="cuda")


def test_spread() -> None:
    assert spread(5, {"a": 10, "b": 10, "c": 5}) == {"a": 2, "b": 2, "c": 1}
    assert sum(spread(7, {"a": 10, "b": 11, "c": 1}).values()) == 7
    assert spread(0, {"a": 3}) == {"a": 0}
    assert spread(3, {"a": 3}) == {"a": 3}
