"""One progress bar for a whole experiment, told of every training step."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging


class RunProgress(TrainerCallback):
    """A bar over all runs, whose steps are fractions of a run. Silent when stderr is no terminal."""

    def __init__(self, runs: int, shown: bool = True) -> None:
        self.bar = tqdm(
            total=runs,
            unit="run",
            disable=not (shown and sys.stderr.isatty()),
            leave=False,
            bar_format="{desc} |{bar:20}| {percentage:3.0f}% [{elapsed}<{remaining}]",
        )
        self.begun = 0.0
        self.run = ""
        self.evaluated = 0

    def __enter__(self) -> RunProgress:
        transformers_logging.disable_progress_bar()  # one bar is enough
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def start(self, arm: str, seed: int) -> None:
        self.run = f"{arm}, seed {seed}"
        self._describe(0)

    def finish(self) -> None:
        self.begun += 1
        self._show(self.begun)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.max_steps > 0:
            self._show(self.begun + min(1.0, state.global_step / state.max_steps))
        if self.evaluated:
            self._describe(0)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._describe(self.evaluated + 1)

    def _describe(self, evaluated: int) -> None:
        """The run at hand, and how many batches of its evaluation are done: generating answers takes its time."""
        self.evaluated = evaluated
        self.bar.set_description_str(self.run + (f", evaluating: batch {evaluated}" if evaluated else ""))

    def _show(self, amount: float) -> None:
        self.bar.n = max(self.bar.n, round(amount, 3))
        self.bar.refresh()
