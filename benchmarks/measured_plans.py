"""What `fish-tuning plan` says beside what a training measures: weights, optimizer, peak, calibration and files.

    FISH_TUNING_DATA=folder python benchmarks/measured_plans.py [--only NAME]

Arms of small experiments are trained by the Trainer of their task on a CPU, two epochs. A plan cannot know where a mask
will put its entries; the column "its own mask" is a plan that is told. Memory is what torch's own CPU
allocator tells its profiler, allocation by allocation; it sees what kernels use inside themselves, too. Without real
data (FISH_TUNING_DATA), only the built-in digits are trained on.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import yaml
from common import Place, print_table
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from fish_tuning.experiments.config.loading import load_experiment
from fish_tuning.experiments.costs import experiment_costs as planning
from fish_tuning.experiments.run.arm import choose_mask, needs_scores, save
from fish_tuning.experiments.run.calibration import calibrate
from fish_tuning.experiments.run.context import make_context
from fish_tuning.experiments.run.measure import optimizer_state_bytes
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.trainers import make_trainer
from fish_tuning.sparse.masked_tensors import masked_tensors
from fish_tuning.training.trainer import FishMaskCallback

LIMIT = 0.1  # of the measured value


class Case(NamedTuple):
    """An experiment: where it is read from, and changes to it."""

    name: str
    file: str | dict[str, Any]
    changes: tuple[str, ...] = ()


def cases() -> list[Case]:
    found = [
        Case("ViT, 32 images", "digits"),
        Case("ViT, 8 images", "digits", ("training.args_override.per_device_train_batch_size=8",)),
    ]
    folder = os.environ.get("FISH_TUNING_DATA")
    if not folder:
        return found
    minilm = {
        "model": {"name": f"{folder}/models/all-MiniLM-L6-v2"},
        "dataset": {"load_args": [f"{folder}/data/glue/mrpc"], "max_train_samples": 48, "max_validation_samples": 16},
    }
    llama = {
        "model": {"name": f"{folder}/models/stories260K"},
        "dataset": {
            "load_args": [f"{folder}/data/rotten_tomatoes"], "task": "causal_lm", "text_column": "text",
            "max_train_samples": 24, "max_validation_samples": 4,
        },
        "fish_tuning": {"methods_to_run": ["lora", "lora-fish"]},
    }  # fmt: skip
    size = "training.args_override.per_device_train_batch_size="
    bf16, checkpoints = "training.args_override.bf16=true", "training.args_override.activation_checkpointing=true"
    base = "peft=[{method: base, args: {target_modules: [query, value]}}]"
    return [
        *found,
        Case("MiniLM, 16", minilm, (size + "16",)),
        Case("MiniLM, 4, 32 tokens", minilm, (size + "4", "training.max_seq_length=32")),
        Case("MiniLM, 16, autocast", minilm, (size + "16", bf16)),
        Case("MiniLM, 16, bf16", minilm, (size + "16", "model.dtype=bfloat16")),
        Case("MiniLM, 16, checkpoints", minilm, (size + "16", checkpoints)),
        Case("MiniLM, 16, base weights", minilm, (size + "16", base)),
        Case("MiniLM, 16, eager", minilm, (size + "16", "model.config_overrides._attn_implementation=eager")),
        Case("Llama, 8", llama, (size + "8",)),
        Case("Llama, 2, 256 tokens", llama, (size + "2", "training.max_seq_length=256")),
        Case("Llama, 8, autocast", llama, (size + "8", bf16)),
        Case("Llama, 8, checkpoints", llama, (size + "8", checkpoints)),
    ]


def load(case: Case, folder: Path) -> Any:
    common = [
        f"training.output_dir={folder}/out", "training.args_override.use_cpu=true", "seeds=[1]",
        "training.args_override.num_train_epochs=2", "training.args_override.report_to=none",
        "fish_tuning.num_samples=16",
    ]  # fmt: skip
    if isinstance(case.file, str):
        return load_experiment(case.file, [*common, "dataset.max_train_samples=64", *case.changes])
    settings = {"lora": {"baseline_rank": 4, "fish_rank": 8}, **case.file}
    file = folder / "case.yaml"
    file.write_text(yaml.safe_dump(settings))
    return load_experiment(file, [*common, *case.changes])


def peak_above(work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator has given out at one time since `work` began, less what came back."""
    gc.collect()  # what is left of earlier work must not come back meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    memory = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = peak = 0
    for _, change in memory:
        now += change
        peak = max(peak, now)
    return peak


def weights_of(model: nn.Module) -> int:
    """Parameters, buffers, and what masks keep beside them; each memory once."""
    held: list[Any] = [*model.parameters(), *model.buffers()]
    for tensor in masked_tensors(model):
        held += [tensor.masked.frozen, *(tensor.masked.group.joined or [tensor.masked.index])]
    memories = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    return sum(memories.values())


class Measured(NamedTuple):
    weights: int
    optimizer: int
    peak: int
    calibration: int | None
    adapter: int
    mask: int | None


def peak_with(mask: Any, config: Any, plan: Any, arm: Any) -> int | None:
    """The peak that is planned where the entries of each tensor are those of this mask."""

    def of_mask(kept: int, sizes: Mapping[str, int]) -> dict[str, int]:
        return {name: int(mask[name].sum()) for name in sizes}

    with mock.patch.object(planning, "spread", of_mask):
        (costs,) = planning.experiment_costs(config, dataclasses.replace(plan, arms=(arm,)), devices=[1]).arms
    return costs.devices[0].peak


class Quiet(TrainerCallback):
    """The progress of nobody."""


def measured(config: Any, plan: Any, arm: Any, folder: Path) -> tuple[Measured, Any]:
    """What the arm takes, and the mask that it got."""
    context = make_context(config, plan, Quiet())
    args = context.arguments(arm, 1)
    model = context.starts(arm.arm, 1, args.device)
    calibration, scored = None, None
    if needs_scores(arm):
        before = weights_of(model)

        def calibrated() -> None:
            nonlocal scored
            scored = calibrate(context, arm, 1, model, args, "")

        calibration = before + peak_above(calibrated)
    mask = choose_mask(context, arm, 1, model, scored)
    trainer = make_trainer(context, arm, model, args, [] if mask is None else [FishMaskCallback(mask)])
    weights = weights_of(model)
    peak = weights + peak_above(trainer.train)
    save(model, mask, folder / "adapter")
    sizes = {path.name: path.stat().st_size for path in (folder / "adapter").iterdir()}
    adapter = sizes.get("adapter_model.safetensors", sizes.get("delta.safetensors", 0))
    state = optimizer_state_bytes(trainer.optimizer)
    return Measured(weights, state, peak, calibration, adapter, sizes.get("fish_mask.safetensors")), mask


def planned(costs: planning.ArmCosts) -> Measured:
    (device,) = costs.devices
    return Measured(
        costs.weights, costs.optimizer, device.peak or 0, costs.calibration_peak, costs.files.adapter or 0,
        costs.files.mask,
    )  # fmt: skip


def ratio(plan: int | None, real: int | None) -> str:
    return "-" if plan is None or real is None else f"{plan / real:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose names hold this text")
    asked = parser.parse_args()
    print(Place(torch.device("cpu")).describe(), "\n")
    rows, missed = [], 0
    for case in cases():
        if asked.only not in case.name:
            continue
        with tempfile.TemporaryDirectory() as name:
            config = load(case, Path(name))
            plan = plan_experiment(config)
            costs = {arm.arm: arm for arm in planning.experiment_costs(config, plan, devices=[1]).arms}
            for arm in plan.arms:
                if arm.arm.endswith("-rev"):  # the same as -fish
                    continue
                said, (real, mask) = planned(costs[arm.arm]), measured(config, plan, arm, Path(name))
                ratios = [ratio(*pair) for pair in zip(said, real, strict=True)]
                told = "-" if mask is None else ratio(peak_with(mask, config, plan, arm), real.peak)
                pairs = [pair for pair in zip(said, real, strict=True) if None not in pair]
                off = [pair for pair in pairs if abs(pair[0] - pair[1]) > LIMIT * pair[1]]
                missed += len(off)
                peaks = f"{said.peak / 1e6:.1f} / {real.peak / 1e6:.1f}"
                rows.append([case.name, arm.arm, peaks, ratios[2], told, *ratios[3:4], *ratios[:2], *ratios[4:]])
                print(*rows[-1], "MISSED" if off else "", file=sys.stderr, flush=True)
    print_table(
        [
            "",
            "arm",
            "peak, MB: plan / measured",
            "ratio",
            "its own mask",
            "calibration",
            "weights",
            "optimizer",
            "adapter file",
            "mask file",
        ],
        rows,
    )
    print(f"\noff by more than {LIMIT:.0%}: {missed}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
