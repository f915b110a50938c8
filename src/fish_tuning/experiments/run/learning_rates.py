"""Each arm's learning rate, chosen on a part of the training set that the choice does not train on."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from fish_tuning.errors import FishTuningError, ProcessesLost, RecordError
from fish_tuning.experiments.config.arm_names import ArmName
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.data.tasks import Encoded
from fish_tuning.experiments.records.run_record import ArmPlan
from fish_tuning.experiments.run.context import Context
from fish_tuning.experiments.run.locks import attempt, wait_for
from fish_tuning.experiments.run.plan_samples import HELD_OUT
from fish_tuning.experiments.run.progress import RunProgress
from fish_tuning.experiments.run.trainers import Diverged
from fish_tuning.experiments.run.trainings import Order, Train
from fish_tuning.files.sealed_json import read_sealed, write_sealed

logger = logging.getLogger(__name__)

# Of a loss: what batches of another size, or other processes, make of it.
_ROUNDING = 1e-3


class LearningRates:
    """`rates(arm)` is the arm's learning rate: the one asked for, or the best of several, found once and kept.

    Each of `training.learning_rates` is tried with the first `training.trial_seeds` seeds on four fifths of the
    training set and judged on the rest, by the mean; one that diverges with a seed is out. Of equal ones the loss
    decides, then the smaller rate. The validation set has no part in it. The trials are written into `selection/` of
    the output folder.

    Args:
        trials: what they share, from `trials_of(context)`.
        progress: told what is tried.
        train: does the training of a trial.
    """

    def __init__(self, trials: Context, progress: RunProgress, train: Train) -> None:
        config = trials.config
        self.of_method = {section.name: config.learning_rates_of(section) for section in config.peft}
        self.context, self.train = trials, train
        self.seeds = config.seeds[: config.training.trial_seeds]
        self.folder = trials.folder / "selection"
        self.progress = progress
        self.chosen: dict[str, float] = {}
        self.ties: dict[str, list[float]] = {}  # the rates that were equally good, where there were several
        if chooses_rates(config):
            self.folder.mkdir(parents=True, exist_ok=True)

    def rates(self, arm: ArmPlan) -> list[float]:
        """Those that the arm chooses from; none where the training arguments have the one."""
        return self.of_method.get(ArmName.parse(arm.arm).method, self.context.config.training.learning_rates)

    def chooses(self, arm: ArmPlan) -> bool:
        """Whether there is a choice to make."""
        return len(self.rates(arm)) > 1

    def __call__(self, arm: ArmPlan) -> float | None:
        """The arm's learning rate; None leaves it to the training arguments.

        Raises FishTuningError when no rate gave a finite metric, or a trial could not be made.
        """
        if self.known(arm) is None and self.chooses(arm):
            lock = self._file(arm).with_suffix(".lock")
            with wait_for(lock, f"the choice of a learning rate for {arm.arm}"), attempt(lock, math.inf):
                self._try_all(arm)
            if self.known(arm) is None:
                trials = self._trials(arm).items()
                errors = "; ".join(f"{rate}: {trial['error']}" for (rate, _), trial in trials if trial["error"])
                raise FishTuningError(f"None of training.learning_rates worked for {arm.arm}: {errors}")
        return self.known(arm)

    def known(self, arm: ArmPlan) -> float | None:
        """The arm's learning rate, if it needs no choice or is chosen already."""
        rates = self.rates(arm)
        if len(rates) < 2:
            return rates[0] if rates else None
        if arm.arm not in self.chosen:
            trials = self._trials(arm)
            if any(self._is_open(trials, rate, seed) for rate in rates for seed in self.seeds):
                return None
            self._choose(arm, trials)
        return self.chosen.get(arm.arm)

    def _choose(self, arm: ArmPlan, trials: Mapping[tuple[float, int], Mapping[str, Any]]) -> None:
        """Take the best rate; of equally good ones that of the lowest loss, then the smallest, however they are listed.

        A few held-out examples often give the same metric.
        """
        of_rate: dict[float, list[Mapping[str, Any]]] = {rate: [] for rate in self.rates(arm)}
        for (rate, _), trial in trials.items():
            of_rate[rate].append(trial)
        worked = {rate: found for rate, found in of_rate.items() if all(each["value"] is not None for each in found)}
        worths = {rate: fmean(map(self._worth, found)) for rate, found in worked.items()}
        if not worths:
            return
        tied = [rate for rate, worth in worths.items() if worth == max(worths.values())]
        losses = {rate: fmean(each["loss"] for each in worked[rate]) for rate in tied}
        lowest = min(losses.values())
        self.chosen[arm.arm] = min(rate for rate in tied if losses[rate] <= lowest + _ROUNDING * abs(lowest))
        if len(tied) > 1:
            self.ties[arm.arm] = sorted(tied)

    def _worth(self, trial: Mapping[str, Any]) -> float:
        """Larger is better; the loss tells arms apart where so few examples leave the metric to chance."""
        return -float(trial["loss"]) if self.context.config.training.choose_by == "loss" else float(trial["value"])

    def _try_all(self, arm: ArmPlan) -> None:
        for seed in self.seeds:  # whose rates share scores
            for rate in self.rates(arm):
                trials = self._trials(arm)
                if self._is_open(trials, rate, seed):
                    trials[rate, seed] = {"key": self._key(arm, rate, seed), **self._trial(arm, rate, seed)}
                    write_sealed(self._file(arm), {self._label(*tried): trial for tried, trial in trials.items()})

    def _is_open(self, trials: Mapping[tuple[float, int], Any], rate: float, seed: int) -> bool:
        """Whether a rate is still to be tried with a seed; none is once the rate has diverged."""
        mine = [trials[rate, each] for each in self.seeds if (rate, each) in trials]
        return (rate, seed) not in trials and all(trial["value"] is not None for trial in mine)

    def _trials(self, arm: ArmPlan) -> dict[tuple[float, int], dict[str, Any]]:
        """What was tried with the configuration at hand."""
        written, found = _read(self._file(arm)), {}
        for seed in self.seeds:
            for rate in self.rates(arm):
                trial = written.get(self._label(rate, seed), {})
                if trial.get("key") == self._key(arm, rate, seed) and "loss" in trial:
                    found[rate, seed] = trial
        return found

    def _label(self, rate: float, seed: int) -> str:
        return str(rate) if seed == self.seeds[0] else f"{rate}, seed {seed}"

    def _file(self, arm: ArmPlan) -> Path:
        return self.folder / f"{arm.arm}.json"

    def _key(self, arm: ArmPlan, rate: float, seed: int) -> str:
        return self.context.keys(arm, seed, rate).run

    def _trial(self, arm: ArmPlan, rate: float, seed: int) -> dict[str, Any]:
        """A verdict about the rate: its metric, or that training diverged. Any other error is none, and is raised."""
        self.progress.start(f"{arm.arm}, learning rate {rate:g}", seed)
        metric = self.context.plan.metric
        try:
            record = self.train(Order(arm.arm, seed, rate, is_trial=True))
            return {"metric": metric, "value": record.value, "loss": record.metrics["loss"], "error": None}
        except Diverged as error:
            logger.debug("%s diverged at learning rate %g", arm.arm, rate, exc_info=True)
            return {"metric": metric, "value": None, "loss": None, "error": str(error)}
        except ProcessesLost:
            raise
        except Exception as error:
            raise FishTuningError(
                f"The trial of learning rate {rate:g} for {arm.arm} failed: {type(error).__name__}: {error}"
            ) from error


def chooses_rates(config: ExperimentConfig) -> bool:
    """Whether any arm has several learning rates to choose from."""
    own = (config.learning_rates_of(section) for section in config.peft)
    return any(len(rates) > 1 for rates in (config.training.learning_rates, *own))


def trials_of(context: Context) -> Context:
    """What trials share: the training examples alone, a part of them held out. The runs' own where no arm chooses."""
    if not chooses_rates(context.config):
        return context
    parts = context.data.train.train_test_split(test_size=HELD_OUT, seed=0)
    data = Encoded(parts["train"], parts["test"], {})
    return replace(
        context,
        data=data,
        starts=context.starts.with_data(data),
        shared={**context.shared, "held_out": HELD_OUT},
        is_trial=True,
    )


def _read(path: Path) -> dict[str, Any]:
    """The trials that were written; those of a damaged file are made again."""
    try:
        return read_sealed(path)[0]
    except FileNotFoundError:
        return {}
    except RecordError as error:
        logger.warning("%s Its trials are made again.", error)
        return {}
