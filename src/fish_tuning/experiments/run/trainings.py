"""The trainings of an experiment, done one after another in this process."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.run.arm import run_arm
from fish_tuning.experiments.run.calibration import Calibration
from fish_tuning.experiments.run.context import Context
from fish_tuning.experiments.run.first_use import use_once


class Order(NamedTuple):
    """A training to do: a run, or the trial of a learning rate. Plain data, so that it can be told to other processes.

    Args:
        arm: its name.
        seed: see `run_arm`.
        learning_rate: None leaves it to the training arguments.
        is_trial: on a part of the training set, and nothing is kept of it.
    """

    arm: str
    seed: int
    learning_rate: float | None = None
    is_trial: bool = False


# Does a training and gives its record, or raises what it raised.
Train = Callable[[Order], RunRecord]


class Trainings:
    """`trainings(order)` does a training and gives its record. Arms of a seed share their scores.

    Args:
        context: of the runs.
        trials: of the trials.
    """

    def __init__(self, context: Context, trials: Context) -> None:
        self.context, self.trials = context, trials
        self._calibrations: dict[tuple[int, bool, str, str], Calibration | None] = {}
        self._used_once = False

    def __call__(self, order: Order) -> RunRecord:
        self._calibrations = {known: made for known, made in self._calibrations.items() if known[0] == order.seed}
        try:
            return self._try(order) if order.is_trial else self._run(order)
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def forget(self) -> None:
        """Let go of scores that were kept for other arms."""
        self._calibrations = {}

    def _run(self, order: Order) -> RunRecord:
        if not self._used_once:
            # The Trainer collects garbage when it starts: up to half a second, in which nothing is trained, to look
            # through the objects of libraries. They are set aside, those of the first steps too.
            gc.freeze()
            use_once(self.context, self.context.plan.arm(order.arm), order.seed)
            gc.collect()
            gc.freeze()
            self._used_once = True
        return self._train(self.context, order)

    def _try(self, order: Order) -> RunRecord:
        folder = self.trials.folder / "selection" / "work" / order.arm
        try:
            return self._train(replace(self.trials, folder=folder), order)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _train(self, context: Context, order: Order) -> RunRecord:
        arm = context.plan.arm(order.arm)
        # Arms that agree share scores.
        shared = order.seed, order.is_trial, context.config.method_of(arm.arm).name, context.choice(arm).score
        known = self._calibrations.get(shared)
        record, self._calibrations[shared] = run_arm(context, arm, order.seed, known, order.learning_rate)
        return record
