"""Each arm's learning rate, chosen on a part of the training set that the choice does not train on."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from filelock import FileLock

from fish_tuning.errors import FishTuningError
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.records.run_keys import config_hash
from fish_tuning.experiments.records.run_record import ArmPlan
from fish_tuning.experiments.run.arm import ArmRun, Calibration
from fish_tuning.experiments.run.plan import HELD_OUT, Plan
from fish_tuning.experiments.run.progress import RunProgress
from fish_tuning.files.atomic import write_atomically

logger = logging.getLogger(__name__)


class LearningRates:
    """`rates(arm)` is the arm's learning rate: the one asked for, or the best of several, found once and kept.

    Each of `training.learning_rates` is tried with the first seed on four fifths of the training set and judged on the
    rest; the validation set has no part in it. The trials are written into `selection/` of the output folder.
    """

    def __init__(
        self, config: ExperimentConfig, plan: Plan, train: Dataset, fixed: Mapping[str, Any], progress: RunProgress
    ) -> None:
        self.config, self.plan, self.fixed, self.progress = config, plan, fixed, progress
        self.rates = config.training.learning_rates
        self.folder = Path(config.training.output_dir) / "selection"
        self.chosen: dict[str, float] = {}
        self.calibrations: dict[tuple[str, float], Calibration | None] = {}
        if len(self.rates) > 1:
            parts = train.train_test_split(test_size=HELD_OUT, seed=0)
            self.train, self.held_out = parts["train"], parts["test"]
            self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def chooses(self) -> bool:
        """Whether there is a choice to make."""
        return len(self.rates) > 1

    def __call__(self, arm: ArmPlan) -> float | None:
        """The arm's learning rate; None leaves it to the training arguments.

        Raises FishTuningError when no rate gave a finite metric.
        """
        if self.known(arm) is None and self.chooses:
            with FileLock(self._file(arm).with_suffix(".lock")):  # another process may be at it: its choice is taken
                self._try_all(arm)
            if self.known(arm) is None:
                errors = "; ".join(f"{rate}: {trial['error']}" for rate, trial in self._trials(arm).items())
                raise FishTuningError(f"None of training.learning_rates worked for {arm.arm}: {errors}")
        return self.known(arm)

    def known(self, arm: ArmPlan) -> float | None:
        """The arm's learning rate, if it needs no choice or is chosen already."""
        if not self.chooses:
            return self.rates[0] if self.rates else None
        if arm.arm not in self.chosen:
            trials = self._trials(arm)
            values = {rate: trial["value"] for rate, trial in trials.items() if trial["value"] is not None}
            if len(trials) < len(self.rates) or not values:
                return None
            self.chosen[arm.arm] = max(values, key=values.__getitem__)
        return self.chosen[arm.arm]

    def _try_all(self, arm: ArmPlan) -> None:
        for rate in self.rates:
            trials = self._trials(arm)
            if rate not in trials:
                trials[rate] = {"key": self._key(arm, rate), **self._trial(arm, rate)}
                text = json.dumps({str(tried): trial for tried, trial in trials.items()}, indent=2)
                write_atomically(self._file(arm), text.encode())

    def _trials(self, arm: ArmPlan) -> dict[float, dict[str, Any]]:
        """What was tried with the configuration at hand."""
        written = _read(self._file(arm))
        return {
            rate: written[str(rate)]
            for rate in self.rates
            if written.get(str(rate), {}).get("key") == self._key(arm, rate)
        }

    def _file(self, arm: ArmPlan) -> Path:
        return self.folder / f"{arm.arm}.json"

    def _key(self, arm: ArmPlan, rate: float) -> str:
        return config_hash(self.config, arm, self.config.seeds[0], {**self.fixed, "held_out": HELD_OUT}, rate)

    def _trial(self, arm: ArmPlan, rate: float) -> dict[str, Any]:
        run = ArmRun(
            self.config, self.plan, arm, self.config.seeds[0], self.train, self.held_out, self.progress,
            self.calibrations.get((arm.method, rate)), rate, reports=False,
        )  # fmt: skip
        self.progress.start(f"{arm.arm}, learning rate {rate:g}", self.config.seeds[0])
        work = self.folder / "work" / arm.arm
        try:
            record = run.run(work, "")
            self.calibrations[arm.method, rate] = run.calibration
            return {"metric": record.metric, "value": record.value, "error": None}
        except Exception as error:  # a rate at which training diverges is one that is not chosen
            logger.debug("%s failed at learning rate %g", arm.arm, rate, exc_info=True)
            return {"metric": self.plan.metric, "value": None, "error": str(error) or type(error).__name__}
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
