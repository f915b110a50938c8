"""How far a whole experiment is, told of every training step: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from fish_tuning.experiments.config.secrets import scrubbed
from fish_tuning.experiments.config.texts import visible

SECONDS_BETWEEN_LINES = 30.0


class RunProgress(TrainerCallback):
    """A bar over all runs, whose steps are fractions of a run; where stderr is no terminal, lines.

    Args:
        runs: how many.
        shown: whether anything is.
        clock: seconds that only grow.
    """

    def __init__(self, runs: int, shown: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        on_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=runs,
            unit="run",
            disable=not (shown and on_terminal),
            leave=False,
            bar_format="{desc} |{bar:20}| {percentage:3.0f}% [{elapsed}<{remaining}]",
        )
        self.lines = _Lines(runs, clock) if shown and not on_terminal else None
        self.begun = 0.0
        self.run: str | None = None
        self.evaluated = 0

    def __enter__(self) -> RunProgress:
        transformers_logging.disable_progress_bar()  # one bar is enough
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def start(self, arm: str, seed: int) -> None:
        if self.run is None:  # what was made before it, for all runs, is no measure of how long one takes
            self.bar.reset()
            if self.lines is not None:
                self.lines.begin()
        self.run = f"{arm}, seed {seed}"
        self._describe(0)

    def finish(self) -> None:
        self.begun += 1
        self._show(self.begun)
        if self.lines is not None:
            self.lines.finish()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.max_steps > 0:
            part = min(1.0, state.global_step / state.max_steps)
            self._show(self.begun + part)
            if self.lines is not None:
                self.lines.tell(f"{self.run}: step {state.global_step} of {state.max_steps}", part)
        if self.evaluated:
            self._describe(0)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._describe(self.evaluated + 1)
        if self.lines is not None:
            self.lines.tell(f"{self.run}: evaluating, batch {self.evaluated}")

    def _describe(self, evaluated: int) -> None:
        """The run at hand, and how many batches of its evaluation are done: generating answers takes its time."""
        self.evaluated = evaluated
        self.bar.set_description_str((self.run or "") + (f", evaluating: batch {evaluated}" if evaluated else ""))

    def _show(self, amount: float) -> None:
        self.bar.n = max(self.bar.n, round(amount, 3))
        self.bar.refresh()


class _Lines:
    """Plain lines on standard error, for logs: the first after half a minute, then at most one in as long."""

    def __init__(self, runs: int, clock: Callable[[], float]) -> None:
        self.runs, self.clock = runs, clock
        self.began = self.told = clock()
        self.done = self.worked = 0  # runs, and those of them that this process has trained
        self.part = 0.0  # of the run at hand

    def begin(self) -> None:
        self.began = self.clock()

    def finish(self) -> None:
        self.worked += self.part > 0  # one that was found finished tells nothing of the time that is left
        self.done += 1
        self.part = 0.0

    def tell(self, what: str, part: float | None = None) -> None:
        """A line, if it is time for one; `part` of the run is done, as much as before if None."""
        self.part = self.part if part is None else max(self.part, part)
        now = self.clock()
        if now - self.told < SECONDS_BETWEEN_LINES:
            return
        self.told = now
        left = self._seconds_left(now)
        about = f", about {_duration(left)} left" if left is not None else ""
        sys.stderr.write(visible(scrubbed(f"{what}; {self.done} of {self.runs} runs done{about}\n")))
        sys.stderr.flush()

    def _seconds_left(self, now: float) -> float | None:
        worked = self.worked + self.part
        return (now - self.began) / worked * (self.runs - self.done - self.part) if worked else None


def _duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for most, size, unit in ((90, 1, "s"), (5400, 60, "min"), (129_600, 3600, "h")):
        if seconds < most:
            value = seconds / size
            return f"{value:.1f} h" if unit == "h" else f"{value:.0f} {unit}"
    return f"{seconds / 86_400:.1f} days"
