"""Run an experiment: every arm with every seed, each written down as soon as it is finished."""

from __future__ import annotations

import gc
import json
import logging
import math
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from fish_tuning.errors import FishTuningError
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.data.digests import data_digest
from fish_tuning.experiments.data.tasks import encode
from fish_tuning.experiments.records.run_keys import config_hash
from fish_tuning.experiments.records.run_record import ArmPlan, RunRecord
from fish_tuning.experiments.report.results_files import write_report
from fish_tuning.experiments.run.arm import ArmRun, Calibration
from fish_tuning.experiments.run.learning_rates import LearningRates
from fish_tuning.experiments.run.plan import Plan
from fish_tuning.experiments.run.progress import RunProgress
from fish_tuning.experiments.run.shards import WHOLE, Shard
from fish_tuning.files.atomic import disk_full, write_atomically

logger = logging.getLogger(__name__)

OnRun = Callable[[RunRecord, bool], None]
WAIT_SECONDS = 2.0  # between two looks at what other processes are doing


def run_experiment(
    config: ExperimentConfig,
    plan: Plan,
    on_run: OnRun | None = None,
    shard: Shard = WHOLE,
    since: float | None = None,
) -> list[RunRecord]:
    """Run what is not finished yet and write the report after every run.

    Seeds are the outer loop, so that an interrupted experiment has whole comparisons. Within a seed every arm of a rank
    starts from the same adapter, all from the same head, and all see the data in the same order; arms of a seed share
    their scores. Several processes may run the same experiment in one folder: each takes runs that no other has, and
    waits for those that others are at.

    Args:
        config: the experiment.
        plan: from `plan_experiment(config)`.
        on_run: called after each run with its record and whether it was there already.
        shard: the part of the runs to do; the others are left alone, and reported where they are finished.
        since: when the work began, as `time.time()` gives it; now if not given. Runs that failed since then, in this or
            another process, are not tried again.

    Returns:
        One record for each arm and seed, in the order of the arms; failed runs have status "failed" and their error.
    """
    return _Session(config, plan, on_run, shard, time.time() if since is None else since).run()


class _Session:
    """One process at work on an experiment's folder."""

    def __init__(self, config: ExperimentConfig, plan: Plan, on_run: OnRun | None, shard: Shard, since: float) -> None:
        self.config, self.plan, self.on_run, self.shard, self.since = config, plan, on_run, shard, since
        self.folder = Path(config.training.output_dir)
        for name in ("runs", "locks"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.train, self.validation, self.more_validation = encode(
            plan.task, plan.processing_class, config.training.max_seq_length
        )
        data = data_digest(self.train, self.validation, *self.more_validation.values())
        plan.facts["data_fingerprint"] = data
        self.fixed = {"data": data, "versions": plan.facts["versions"]}
        self.calibrations: dict[tuple[int, str, float | None], Calibration | None] = {}
        self.records: dict[tuple[str, int], RunRecord] = {}

    def run(self) -> list[RunRecord]:
        todo = [(arm, seed) for seed in self.config.seeds for arm in self.plan.arms]
        mine = todo[self.shard.number - 1 :: self.shard.of]
        with RunProgress(len(mine)) as self.progress:
            self.tuner = LearningRates(self.config, self.plan, self.train, self.fixed, self.progress)
            while mine:
                left = [(arm, seed) for arm, seed in mine if not self._take(arm, seed)]
                if len(left) == len(mine):
                    time.sleep(WAIT_SECONDS)  # others are at the rest
                mine = left
        for arm, seed in todo:
            if (arm.arm, seed) not in self.records:
                self._read_of_other_shards(arm, seed)
        self._report()
        return _in_order(self.records, self.plan)

    def _read_of_other_shards(self, arm: ArmPlan, seed: int) -> None:
        rate = self.tuner.known(arm)
        if rate is not None or not self.tuner.chooses:
            key = config_hash(self.config, arm, seed, self.fixed, rate)
            record = _finished(self.folder, arm.arm, seed, key)
            if record is not None:
                self.records[arm.arm, seed] = record

    def _take(self, arm: ArmPlan, seed: int) -> bool:
        """Do a run, or read it; False when another process is at it."""
        path = _run_file(self.folder, arm.arm, seed)
        try:
            with FileLock(self.folder / "locks" / f"{path.stem}.lock", timeout=0):
                record, known = self._record(arm, seed, path)
        except Timeout:
            return False
        self.records[arm.arm, seed] = record
        self.progress.finish()
        if self.on_run is not None:
            self.on_run(record, known)
        self._report()
        return True

    def _record(self, arm: ArmPlan, seed: int, path: Path) -> tuple[RunRecord, bool]:
        """The run's record and whether it was there already."""
        self.progress.start(arm.arm, seed)
        try:
            rate = self.tuner(arm)
        except FishTuningError as error:
            return self._written(_failed(self.config, self.plan, arm, seed, str(error)), path), False
        key = config_hash(self.config, arm, seed, self.fixed, rate)
        record = _finished(self.folder, arm.arm, seed, key, self.since)
        if record is not None:
            return record, True
        shared = (seed, arm.method, rate)  # arms that agree in these share their scores
        self.calibrations = {known: made for known, made in self.calibrations.items() if known[0] == seed}
        run = ArmRun(
            self.config,
            self.plan,
            arm,
            seed,
            self.train,
            self.validation,
            self.progress,
            self.calibrations.get(shared),
            rate,
            self.more_validation,
        )
        record = _attempt(run, self.folder, key)
        self.calibrations[shared] = run.calibration
        return self._written(record, path), False

    def _written(self, record: RunRecord, path: Path) -> RunRecord:
        write_atomically(path, json.dumps(record.to_dict(), indent=2).encode())
        return record

    def _report(self) -> None:
        self.plan.facts["learning_rates"] = self.tuner.chosen
        write_report(self.config, self.plan.facts, _in_order(self.records, self.plan), self.folder)


def _attempt(run: ArmRun, folder: Path, key: str) -> RunRecord:
    """The finished run's record, or that of its failure, whose traceback goes into a file beside it."""
    log = _run_file(folder, run.arm.arm, run.seed).with_suffix(".log")
    try:
        record = run.run(folder, key)
        log.unlink(missing_ok=True)
        return record
    except Exception as error:  # whatever stops one arm must not stop the others; nothing is hidden: it is in the table
        if full := disk_full(error):
            raise full from error  # which would stop every other arm too, after training it for nothing
        log.write_text(traceback.format_exc())
        logger.debug("%s with seed %d failed", run.arm.arm, run.seed, exc_info=True)
        reason = str(error).strip() or "no message"
        kind = "" if isinstance(error, FishTuningError) else f"{type(error).__name__}: "
        return _failed(run.config, run.plan, run.arm, run.seed, f"{kind}{reason} (traceback in {log})", key)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _failed(config: ExperimentConfig, plan: Plan, arm: ArmPlan, seed: int, error: str, key: str = "") -> RunRecord:
    return RunRecord(
        arm=arm.arm,
        seed=seed,
        status="failed",
        metric=plan.metric,
        error=error,
        config_hash=key,
        experiment=config.name,
        task=plan.task.name,
        model=config.model.name,
    )


def _finished(folder: Path, arm: str, seed: int, key: str, since: float = math.inf) -> RunRecord | None:
    """The record of a run with this key that is finished, or has failed since a time."""
    path = _run_file(folder, arm, seed)
    try:
        record = RunRecord.from_dict(json.loads(path.read_text()))
        failed_now = path.stat().st_mtime >= since
    except (OSError, ValueError, TypeError, AttributeError):  # none, torn, or not a record
        return None
    return record if record.config_hash == key and (record.status == "ok" or failed_now) else None


def _run_file(folder: Path, arm: str, seed: int) -> Path:
    return folder / "runs" / f"{arm}-seed{seed}.json"


def _in_order(records: dict[tuple[str, int], RunRecord], plan: Plan) -> list[RunRecord]:
    order = [arm.arm for arm in plan.arms]
    return [records[key] for key in sorted(records, key=lambda key: (order.index(key[0]), key[1]))]
