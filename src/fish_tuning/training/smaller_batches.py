"""Scoring again in smaller batches where memory ran out, as a Trainer with `auto_find_batch_size` trains again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate.utils.memory import clear_device_cache  # type: ignore[import-untyped]

from fish_tuning.errors import ran_out_of_memory
from fish_tuning.scores.batches import batch_size, rows

logger = logging.getLogger("fish_tuning.scores.fisher")

Result = TypeVar("Result")


def in_batches_that_fit(trainer: Any, calibration: dict[str, Any], score: Callable[[dict[str, Any]], Result]) -> Result:
    """`score(calibration)`; where the Trainer is to find its batch size, in halves until they fit.

    Scores do not depend on the size. The Trainer keeps its own: scoring may take more memory than training, or less.
    """
    size = _size(trainer, calibration)
    while True:
        try:
            return score(calibration)
        except Exception as error:
            if not trainer.args.auto_find_batch_size or size == 1 or not ran_out_of_memory(error):
                raise
        size //= 2
        logger.warning("Scoring ran out of memory; it begins again in batches of %d.", size)
        clear_device_cache(garbage_collection=True)  # here, where the error no longer holds what it was raised in
        calibration = calibration | {"calibration_dataloader": _smaller(trainer, calibration, size)}


def _size(trainer: Any, calibration: dict[str, Any]) -> int:
    """The largest number of examples in a batch."""
    batches = calibration["calibration_dataloader"]
    if not isinstance(batches, list):
        return int(trainer._train_batch_size)
    return max((batch_size(batch) for batch in batches), default=1) // _rows_each(calibration)


def _smaller(trainer: Any, calibration: dict[str, Any], size: int) -> Any:
    batches = calibration["calibration_dataloader"]
    if isinstance(batches, list):
        step = size * _rows_each(calibration)
        return [
            rows(batch, start, min(start + step, batch_size(batch)))
            for batch in batches
            for start in range(0, batch_size(batch), step)
        ]
    before = trainer._train_batch_size  # of which transformers makes the loader, in its own search too
    try:
        trainer._train_batch_size = size
        return trainer.get_train_dataloader()
    finally:
        trainer._train_batch_size = before


def _rows_each(calibration: dict[str, Any]) -> int:
    return int(calibration.get("rows_per_example", 1))
