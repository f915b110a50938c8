"""TensorBoard, W&B, MLflow, trackio: one run of the logger's for each arm and seed, though all share a process.

transformers' callbacks are made for one training a process: they end a run before the last evaluation is logged, or
never. Here a run stays open until it has been evaluated, and is closed whatever happens.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.integrations.integration_utils import TensorBoardCallback, get_reporting_integration_callbacks

from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.training.reporting import report_figures

logger = logging.getLogger(__name__)

NO_REPORTS = {"report_to": "none"}  # for trainings that are no arm's: warm-up steps, trials of learning rates


def logged_name(config: ExperimentConfig, arm: str, seed: int, prefix: str | None = None) -> str:
    """What loggers call a run; `prefix` stands in for the experiment's name."""
    return f"{prefix or config.name}-{arm}-seed{seed}"


@contextmanager
def open_loggers(trainer: Trainer, folder: Path, figures: Mapping[str, float]) -> Iterator[None]:
    """Around a run's training and evaluation: logs its figures, and closes its loggers' runs at the end.

    TensorBoard's files go to `folder`, or to the run's own below TENSORBOARD_LOGGING_DIR; the other loggers have their
    own places. A run that raised is marked as failed where the logger knows such a thing. A logger that cannot be
    closed is a warning, because the run itself is done.
    """
    report_figures(trainer, figures)
    held = _hold(trainer)
    _place_tensorboard(trainer, held, folder)
    close = _closer()
    failed = True
    try:
        yield
        failed = False
    finally:
        _end(trainer, held, close, failed)


class _HeldOpen:
    """A callback that reports, all of it but the end of training, which it hears of when the run is over."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def __getattr__(self, name: str) -> Any:
        return getattr(self.callback, name)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Put off."""


def _hold(trainer: Trainer) -> list[_HeldOpen]:
    """Put a `_HeldOpen` in the place of every callback that reports."""
    kinds = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    callbacks = trainer.callback_handler.callbacks
    callbacks[:] = [_HeldOpen(callback) if isinstance(callback, kinds) else callback for callback in callbacks]
    return [callback for callback in callbacks if isinstance(callback, _HeldOpen)]


def _place_tensorboard(trainer: Trainer, held: list[_HeldOpen], folder: Path) -> None:
    """Its default is the folder of checkpoints, which may be removed."""
    if not trainer.is_world_process_zero():
        return
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier configuration: TensorBoard would join the two
    shared = os.environ.get("TENSORBOARD_LOGGING_DIR")
    name = re.sub(r"[/\\]", "_", str(trainer.args.run_name))  # one folder, wherever it would lead
    own = Path(shared).expanduser() / name if shared else folder
    for callback in held:
        if isinstance(callback.callback, TensorBoardCallback):
            callback.callback.logging_dir = str(own)


def _closer() -> Callable[[bool], None]:
    """What closes the W&B and MLflow runs that are opened from here on; one that is open already is the caller's."""
    before = {name: _active(name) for name in ("wandb", "mlflow")}

    def close(failed: bool) -> None:
        if _active("wandb") not in (None, before["wandb"]):
            sys.modules["wandb"].finish(exit_code=int(failed))
        if _active("mlflow") not in (None, before["mlflow"]):
            sys.modules["mlflow"].end_run("FAILED" if failed else "FINISHED")

    return close


def _active(name: str) -> str | None:
    """The id of the logger's current run, where the logger is in use at all."""
    module = sys.modules.get(name)
    run = None if module is None else module.run if name == "wandb" else module.active_run()
    return None if run is None else str(run.id if name == "wandb" else run.info.run_id)


def _end(trainer: Trainer, held: list[_HeldOpen], close: Callable[[bool], None], failed: bool) -> None:
    def tell(callback: Any) -> None:
        callback.on_train_end(
            trainer.args, trainer.state, trainer.control, model=trainer.model, processing_class=trainer.processing_class
        )

    ends = [functools.partial(tell, callback.callback) for callback in held]
    own = functools.partial(close, failed)
    # A failed run is closed first: MLflow's callback would call it finished, W&B's would upload its model.
    for end in [own, *ends] if failed else [*ends, own]:
        try:
            end()
        except Exception as error:
            logger.warning("The logs of %s could not be closed: %s", trainer.args.run_name, error, exc_info=True)
