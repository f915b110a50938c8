"""Run an experiment: every arm with every seed, each written down as soon as it is finished."""

from __future__ import annotations

import gc
import logging
import math
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from fish_tuning.errors import FishTuningError, ProcessesLost
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.secrets import scrubbed
from fish_tuning.experiments.records.record_files import (
    find_record,
    record_file,
    relabelled,
    run_name,
    write_record,
)
from fish_tuning.experiments.records.run_keys import RunKeys
from fish_tuning.experiments.records.run_record import ArmPlan, RunRecord
from fish_tuning.experiments.report.results_files import write_report
from fish_tuning.experiments.run.cards import tell_all_seeds
from fish_tuning.experiments.run.context import Context, make_context
from fish_tuning.experiments.run.facts import report_facts
from fish_tuning.experiments.run.launch import this_launch
from fish_tuning.experiments.run.learning_rates import LearningRates, trials_of
from fish_tuning.experiments.run.locks import MOST_DEATHS, Waiting, attempt, held
from fish_tuning.experiments.run.plan import Plan
from fish_tuning.experiments.run.progress import RunProgress
from fish_tuning.experiments.run.shards import WHOLE, Shard
from fish_tuning.experiments.run.together import Together
from fish_tuning.experiments.run.trainings import Order, Train, Trainings
from fish_tuning.files.atomic import disk_full

logger = logging.getLogger(__name__)

OnRun = Callable[[RunRecord, bool], None]
OnFingerprints = Callable[[Mapping[str, str]], None]


def run_experiment(
    config: ExperimentConfig,
    plan: Plan,
    on_run: OnRun | None = None,
    shard: Shard = WHOLE,
    since: float | None = None,
    shows_progress: bool = True,
    on_fingerprints: OnFingerprints | None = None,
) -> list[RunRecord]:
    """Run what is not finished yet and write the report after every run.

    Seeds are the outer loop, so that an interrupted experiment has whole comparisons. Within a seed every arm of a rank
    starts from the same adapter, all from the same head, and all see the data in the same order; arms of a seed share
    their scores. Several processes may run the same experiment in one folder: each takes runs that no other has, and
    waits for those that others are at.

    A finished run is known by its key and by its adapter, which must be the one that it wrote; else it is done again.

    Args:
        config: the experiment.
        plan: from `plan_experiment(config)`.
        on_run: called after each run with its record and whether it was there already.
        shard: the part of the runs to do; the others are left alone, and reported where they are finished.
        since: when the work began, as `time.time()` gives it; now if not given. Runs that failed since then, in this or
            another process, are not tried again; nor are those that have killed two processes since then.
        shows_progress: a bar on a terminal, else a line now and then, on standard error.
        on_fingerprints: called before the first run with the digests of data and weights, which no plan has.

    Processes of one launch (torchrun, accelerate) do every training together: process 0 decides and writes, the others
    follow it.

    Returns:
        One record for each arm and seed, in the order of the arms; failed runs have status "failed" and their error.
        None in processes that follow.

    Raises:
        ProcessesLost: one of the launch's processes has ended, or failed alone.
    """
    launch = this_launch()
    with RunProgress(len(shard.part(plan.arms, config.seeds)), shown=shows_progress and launch.leads) as progress:
        context = make_context(config, plan, progress)
        if on_fingerprints is not None:
            on_fingerprints(context.fingerprints)
        trials = trials_of(context)
        train = Trainings(context, trials)
        try:
            if launch.number == 1:
                return _Session(context, trials, progress, train, on_run, shard, since).run()
            context.join(launch)
            together = Together(train, launch, forget=train.forget)
            if not launch.leads:
                together.follow()
                return []
            try:
                return _Session(context, trials, progress, together, on_run, shard, since).run()
            finally:
                together.close()
        finally:
            gc.unfreeze()


class _Session:
    """One process at work on an experiment's folder."""

    def __init__(
        self,
        context: Context,
        trials: Context,
        progress: RunProgress,
        train: Train,
        on_run: OnRun | None,
        shard: Shard,
        since: float | None,
    ) -> None:
        self.context, self.progress, self.train, self.on_run, self.shard = context, progress, train, on_run, shard
        self.since = time.time() if since is None else since
        self.folder = context.folder
        for name in ("runs", "locks"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.rates = LearningRates(trials, progress, train)
        self.records: dict[tuple[str, int], RunRecord] = {}

    def run(self) -> list[RunRecord]:
        self._take_all()
        for arm, seed in WHOLE.part(self.context.plan.arms, self.context.config.seeds):
            if (arm.arm, seed) not in self.records:
                self._read_of_other_shards(arm, seed)
        self._report()
        return self._in_order()

    def _take_all(self) -> None:
        plan, seeds = self.context.plan, self.context.config.seeds
        mine, waiting = self.shard.part(plan.arms, seeds), Waiting()
        while mine:
            left = [(arm, seed) for arm, seed in mine if not self._take(arm, seed)]
            if len(left) < len(mine):
                waiting.over()
            elif left:  # others are at all of them
                arm, seed = left[0]
                waiting.on(f"{arm.arm}, seed {seed}", self._lock(arm, seed))
            mine = left

    def _read_of_other_shards(self, arm: ArmPlan, seed: int) -> None:
        keys = self._keys(arm, seed)
        found = find_record(self.folder, arm.arm, seed, keys.run, math.inf)
        if found.record is not None:
            self.records[arm.arm, seed] = self._named(found.record, arm, keys)

    def _take(self, arm: ArmPlan, seed: int) -> bool:
        """Do a run, or read it; False when another process is at it."""
        with held(self._lock(arm, seed)) as mine:
            if not mine:
                return False
            record, known = self._record(arm, seed)
        self.records[arm.arm, seed] = record
        self.progress.finish()
        if self.on_run is not None:
            self.on_run(record, known)
        self._report()
        return True

    def _record(self, arm: ArmPlan, seed: int) -> tuple[RunRecord, bool]:
        """The run's record and whether it was there already."""
        self.progress.start(arm.arm, seed)
        if known := self._found(arm, seed):
            return known, True
        with attempt(self._lock(arm, seed), self.since) as deaths:
            try:
                if deaths >= MOST_DEATHS:
                    raise FishTuningError(f"{deaths} processes that were at it have been killed; out of memory?")
                if self.rates.known(arm) is None and self.rates.chooses(arm):
                    self.rates(arm)
                    if known := self._found(arm, seed):
                        return known, True
                record = self._run(arm, seed)
            except ProcessesLost as error:  # which stops everything, and is in the table all the same
                write_record(self.folder, self._failure(arm, seed, error))
                raise
            except Exception as error:  # what stops one arm must not stop the others; it is in the table
                record = self._failure(arm, seed, error)
            return write_record(self.folder, record), False

    def _found(self, arm: ArmPlan, seed: int) -> RunRecord | None:
        """What is written of the run: that it has finished, or has failed since the work began."""
        keys = self._keys(arm, seed)
        found = find_record(self.folder, arm.arm, seed, keys.run, self.since)
        if found.damage:
            logger.warning("%s, seed %d is run again: %s.", arm.arm, seed, found.damage)
        return None if found.record is None else self._named(found.record, arm, keys)

    def _keys(self, arm: ArmPlan, seed: int) -> RunKeys:
        rate = self.rates.known(arm)
        keys = self.context.keys(arm, seed, rate)
        # Before a rate is chosen there can only be a failure, which must not pass for one of the arguments' own rate.
        return keys._replace(run=f"{keys.setting}-unchosen") if rate is None and self.rates.chooses(arm) else keys

    def _run(self, arm: ArmPlan, seed: int) -> RunRecord:
        record = self.train(Order(arm.arm, seed, self.rates.known(arm)))
        _log_file(self.folder, arm, seed).unlink(missing_ok=True)
        return record

    def _failure(self, arm: ArmPlan, seed: int, error: Exception) -> RunRecord:
        """The record of a failure, whose traceback goes into a file beside it. A full disk stops everything."""
        if full := disk_full(error):
            raise full from error  # it would stop every other arm too, after training it for nothing
        context, keys, log = self.context, self._keys(arm, seed), _log_file(self.folder, arm, seed)
        log.write_text(scrubbed("".join(traceback.format_exception(error))))
        logger.debug("%s with seed %d failed", arm.arm, seed, exc_info=error)
        reason = str(error).strip() or "no message"
        kind = "" if isinstance(error, FishTuningError) else f"{type(error).__name__}: "
        return RunRecord(
            arm=arm.arm,
            seed=seed,
            status="failed",
            metric=context.plan.metric,
            error=f"{kind}{reason} (traceback in {log})",
            config_hash=keys.run,
            setting=keys.setting,
            common=keys.common,
            method_own=keys.method_own,
            experiment=context.config.name,
            task=context.plan.task.name,
            model=context.config.model.name,
        )

    def _named(self, record: RunRecord, arm: ArmPlan, keys: RunKeys) -> RunRecord:
        config = self.context.config
        named = relabelled(record, config.name, self.context.plan.task.name, config.model.name, keys)
        trained = record.trainable_parameters
        if arm.selection is not None or record.status != "ok" or trained is None:
            return named
        # What of a dense arm counts as its head is the asking experiment's to say: it trains the same either way.
        return replace(named, kept_parameters=trained - arm.dense, head_parameters=arm.dense)

    def _lock(self, arm: ArmPlan, seed: int) -> Path:
        return self.folder / "locks" / f"{run_name(arm.arm, seed)}.lock"

    def _report(self) -> None:
        ties = {"learning_rate_ties": dict(self.rates.ties)} if self.rates.ties else {}
        facts = report_facts(self.context.plan, self.rates.chosen, **self.context.fingerprints, **ties)
        write_report(self.context.config, facts, self._in_order(), self.folder)
        tell_all_seeds(self.context.config, self._in_order(), self.folder)

    def _in_order(self) -> list[RunRecord]:
        order = [arm.arm for arm in self.context.plan.arms]
        return [self.records[key] for key in sorted(self.records, key=lambda key: (order.index(key[0]), key[1]))]


def _log_file(folder: Path, arm: ArmPlan, seed: int) -> Path:
    return record_file(folder, arm.arm, seed).with_suffix(".log")
