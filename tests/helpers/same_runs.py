"""An experiment in one process, and what several processes must make of it: the same adapters, deltas and masks."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import assert_same_tensors
from torch import Tensor

from fish_tuning import load_mask
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.runner import run_experiment
from fish_tuning.files.mask_file import MASK_FILE_NAME

SETTINGS = [
    "peft=[{method: lora}, {method: base, args: {target_modules: [query]}}]",
    "protocol=fixed_count", "fish_tuning.kept_parameters=[40]",
    "fish_tuning.methods_to_run=[lora, lora-fish, base-fish]",
    "training.args_override.learning_rate=0.01",
    "model.config_overrides={hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}",
]  # fmt: skip
ARMS = ["lora", "lora-fish@n40", "base-fish@n40"]
BATCH_SIZE = "training.args_override.per_device_train_batch_size="


def run_alone(config: ExperimentConfig) -> None:
    records = run_experiment(config, plan_experiment(config), shows_progress=False)
    assert [(record.arm, record.status) for record in records] == [(arm, "ok") for arm in ARMS]


def folder_of(results: Path, arm: str) -> Path:
    return results / "adapters" / f"{arm}-seed1"


def trained(results: Path, arm: str) -> dict[str, Tensor]:
    """What was saved of an arm: an adapter, or of base weights a delta."""
    file = "delta.safetensors" if arm.startswith("base") else "adapter_model.safetensors"
    return load_file(folder_of(results, arm) / file)


def assert_same_runs(results: Path, alone: Path, sharded_by: str) -> None:
    for arm in ARMS:
        ours, theirs = trained(results, arm), trained(alone, arm)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert f"examples a step, {sharded_by}" in (folder_of(results, arm) / "README.md").read_text()
        if arm == "lora":
            continue
        mask, others = (load_mask(folder_of(each, arm) / MASK_FILE_NAME) for each in (results, alone))
        assert_same_tensors(mask, others)
        for name, selected in mask.items() if arm.startswith("lora") else ():
            saved = name.replace(".modules_to_save", "").replace(".default", "")
            assert torch.equal(ours[saved][~selected], theirs[saved][~selected]), "frozen entries keep their bits"
