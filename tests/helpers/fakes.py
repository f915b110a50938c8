"""Run records that no model was trained for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.records.run_record import KeptShare, RunRecord

SEEDS = (1, 2, 3)


def ok(arm: str, seed: int, value: float, **changes: Any) -> RunRecord:
    values: dict[str, Any] = {
        "trainable_parameters": 1000,
        "train_seconds": 10.0,
        "fisher_seconds": 0.0,
        "peak_memory_bytes": 1_500_000_000,
        "optimizer_state_bytes": 8_008,
        "adapter_bytes": 4_321,
    }
    return RunRecord(arm, seed, "ok", "accuracy", value=value, **(values | changes))


def failed(arm: str, seed: int, error: str = "RuntimeError: loss is not finite") -> RunRecord:
    return RunRecord(arm, seed, "failed", "accuracy", error=error)


def scores(arm: str, values: Sequence[float], **changes: Any) -> list[RunRecord]:
    return [ok(arm, seed, value, **changes) for seed, value in enumerate(values, 1)]


def kept(first: int, second: int) -> list[KeptShare]:
    return [KeptShare(0, "query.lora_A", first, 10), KeptShare(1, "query.lora_B", second, 10)]


def experiment(**changes: Any) -> ExperimentConfig:
    arms = {"methods_to_run": ["lora", "lora-fish"]}
    data = {"name": "trial", "model": {"name": "m"}, "dataset": {"load_args": ["d"]}, "seeds": list(SEEDS)}
    return ExperimentConfig(**({**data, "fish_tuning": arms} | changes))
