"""Run an experiment: every arm with every seed, each written down as soon as it is finished."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fish_tuning.errors import FishTuningError
from fish_tuning.experiments.arm_names import ArmName
from fish_tuning.experiments.arms import ArmRun, Calibration
from fish_tuning.experiments.config import LORA_METHODS, ExperimentConfig
from fish_tuning.experiments.data import tokenize
from fish_tuning.experiments.digests import data_digest
from fish_tuning.experiments.files import write_atomically
from fish_tuning.experiments.plan import Plan
from fish_tuning.experiments.progress import RunProgress
from fish_tuning.experiments.records import ArmPlan, RunRecord
from fish_tuning.experiments.report import write_report

logger = logging.getLogger(__name__)

OnRun = Callable[[RunRecord, bool], None]


def run_experiment(config: ExperimentConfig, plan: Plan, on_run: OnRun | None = None) -> list[RunRecord]:
    """Run what is not finished yet and write the report after every run.

    Seeds are the outer loop, so that an interrupted experiment has whole comparisons. Within a seed every arm of a rank
    starts from the same adapter, all from the same head, and all see the data in the same order; arms of a seed share
    their scores.

    Args:
        config: the experiment.
        plan: from `plan_experiment(config)`.
        on_run: called after each run with its record and whether it was there already.

    Returns:
        One record for each arm and seed, in the order of the arms; failed runs have status "failed" and their error.
    """
    folder = Path(config.training.output_dir)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    train, validation = tokenize(plan.task, plan.tokenizer, config.training.max_seq_length)
    fixed = {"data": data_digest(train, validation), "versions": plan.facts["versions"]}
    records: dict[tuple[str, int], RunRecord] = {}
    with RunProgress(len(plan.arms) * len(config.seeds)) as progress:
        for seed in config.seeds:
            calibrations: dict[str, Calibration | None] = {}  # by PEFT method
            for arm in plan.arms:
                key = _config_hash(config, arm, seed, fixed)
                record = _finished(folder, arm.arm, seed, key)
                known = record is not None
                progress.start(arm.arm, seed)
                if record is None:
                    run = ArmRun(config, plan, arm, seed, train, validation, progress, calibrations.get(arm.method))
                    record = _attempt(run, folder, key)
                    calibrations[arm.method] = run.calibration
                    write_atomically(_run_file(folder, arm.arm, seed), json.dumps(record.to_dict(), indent=2).encode())
                records[arm.arm, seed] = record
                progress.finish()
                if on_run is not None:
                    on_run(record, known)
                write_report(config, plan.facts, _in_order(records, plan), folder)
    return _in_order(records, plan)


def _attempt(run: ArmRun, folder: Path, key: str) -> RunRecord:
    """The finished run's record, or that of its failure, whose traceback goes into a file beside it."""
    log = _run_file(folder, run.arm.arm, run.seed).with_suffix(".log")
    try:
        record = run.run(folder, key)
        log.unlink(missing_ok=True)
        return record
    except Exception as error:  # whatever stops one arm must not stop the others; nothing is hidden: it is in the table
        log.write_text(traceback.format_exc())
        logger.debug("%s with seed %d failed", run.arm.arm, run.seed, exc_info=True)
        reason = str(error).strip() or "no message"
        kind = "" if isinstance(error, FishTuningError) else f"{type(error).__name__}: "
        return RunRecord(
            arm=run.arm.arm,
            seed=run.seed,
            status="failed",
            metric=run.plan.metric,
            error=f"{kind}{reason} (traceback in {log})",
            config_hash=key,
        )
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _config_hash(config: ExperimentConfig, arm: ArmPlan, seed: int, fixed: dict[str, Any]) -> str:
    """What a run depends on; a finished run is not repeated while this stays the same."""
    parts = config.model_dump(mode="json", include={"model", "dataset", "training"})
    del parts["training"]["output_dir"]
    parts["training"]["args_override"] |= config.method_of(arm.arm).training_args
    parts |= {"arm": arm.arm, "seed": seed, "settings": arm.settings, "trainable_parameters": arm.trainable_parameters}
    parts |= fixed
    if arm.method in LORA_METHODS:
        parts["init_lora_weights"] = config.lora.init_lora_weights  # which settings, made without weights, lack
    selection = ArmName.parse(arm.arm).selection
    if selection is not None:
        parts["names_to_exclude"] = config.lora.names_to_exclude
        parts |= {"quotas": config.fish_tuning.quotas} if selection.quotas else {}
        if selection.method != "rand":  # which needs no scores
            parts |= {"num_samples": config.fish_tuning.num_samples, "warmup_steps": config.warmup_steps(arm.method)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _finished(folder: Path, arm: str, seed: int, key: str) -> RunRecord | None:
    try:
        record = RunRecord.from_dict(json.loads(_run_file(folder, arm, seed).read_text()))
    except (OSError, ValueError, TypeError, AttributeError):  # none, torn, or not a record
        return None
    return record if record.status == "ok" and record.config_hash == key else None


def _run_file(folder: Path, arm: str, seed: int) -> Path:
    return folder / "runs" / f"{arm}-seed{seed}.json"


def _in_order(records: dict[tuple[str, int], RunRecord], plan: Plan) -> list[RunRecord]:
    order = [arm.arm for arm in plan.arms]
    return [records[key] for key in sorted(records, key=lambda key: (order.index(key[0]), key[1]))]
