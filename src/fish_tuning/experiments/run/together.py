"""Trainings that all processes of a launch do together: process 0 says which, and all learn how it went.

What is told goes through the store that the processes met at, beside the tensors that training exchanges: a process
that is stuck in an exchange hears of a failure as soon as that breaks.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from fish_tuning.errors import FishTuningError, ProcessesLost
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.run.launch import Launch
from fish_tuning.experiments.run.trainings import Order, Train

logger = logging.getLogger(__name__)

GRACE_SECONDS = 30.0  # for the others to tell how it went, once one has failed
LOOK_SECONDS = 0.05  # between two looks at what the others tell
_numbers = itertools.count()


class Together:
    """`together(order)` lets every process do a training; the others `follow()`.

    A training that fails in all processes has failed, and the next one may follow. One that fails in some, while others
    wait for what will never come, ends them all.

    Args:
        train: does a training in this process.
        launch: which process this is.
        store: where they tell each other; `meet()` by default.
        forget: called where a training failed in any process: what one keeps for the next training, all must keep.
    """

    def __init__(
        self, train: Train, launch: Launch, store: Any = None, forget: Callable[[], None] = lambda: None
    ) -> None:
        self._train, self._launch, self._forget = train, launch, forget
        self._store = meet() if store is None else store
        self._number = 0

    def __call__(self, order: Order) -> RunRecord:
        """Do the training in every process.

        Raises what it raised here, FishTuningError where it failed elsewhere, and ProcessesLost.
        """
        self._set(f"order/{self._number}", json.dumps(order))
        return self._do(order)

    def close(self) -> None:
        """Tell the others that there is nothing more to do."""
        with suppress(ProcessesLost):
            self._set(f"order/{self._number}", json.dumps(None))

    def follow(self) -> None:
        """Do what process 0 says, until it says that there is nothing more. Raises ProcessesLost."""
        while True:
            key = f"order/{self._number}"
            while not self._has(key):
                time.sleep(LOOK_SECONDS)
            order = json.loads(self._get(key))
            if order is None:
                return
            try:
                self._do(Order(*order))
            except ProcessesLost:
                raise
            except Exception as error:  # process 0 writes it down
                logger.debug("%s: %s failed", self._launch, order, exc_info=error)

    def _do(self, order: Order) -> RunRecord:
        number, self._number = self._number, self._number + 1
        try:
            record, error = self._train(order), None
        except KeyboardInterrupt:
            self._check_lost(number)  # a launcher stops all where one has failed
            self._give_up(number, f"{self._launch} was interrupted")
            raise
        except Exception as caught:
            record, error = None, caught
        try:
            elsewhere = self._outcomes(number, "" if error is None else _text(error))
        except ProcessesLost as lost:
            raise lost from error
        if error is not None or elsewhere:
            self._forget()
        if error is not None:
            raise error
        if record is None or elsewhere:
            raise FishTuningError(elsewhere)
        return record

    def _outcomes(self, number: int, own: str) -> str:
        """Tell how the training went here, and wait for all to tell; returns the first failure, if there is one."""
        self._set(_outcome(number, self._launch.rank), own)
        told, until = {self._launch.rank: own}, math.inf
        try:
            while missing := sorted(set(range(self._launch.number)) - set(told)):
                self._check_lost(number)
                if any(told.values()):
                    until = min(until, time.monotonic() + GRACE_SECONDS)
                if time.monotonic() > until:
                    raise self._lost(number, told, missing)
                time.sleep(LOOK_SECONDS)
                told |= {
                    rank: self._get(_outcome(number, rank)) for rank in missing if self._has(_outcome(number, rank))
                }
        except KeyboardInterrupt:  # by the launcher, because one process has ended
            if any(told.values()):
                raise self._lost(number, told, missing) from None
            raise
        self._check_lost(number)
        return self._first_of(told)

    def _first_of(self, told: Mapping[int, str]) -> str:
        return next((f"Process {r} of {self._launch.number}: {text}" for r, text in sorted(told.items()) if text), "")

    def _lost(self, number: int, told: Mapping[int, str], missing: list[int]) -> ProcessesLost:
        silent = f"Not heard of since: process {', '.join(map(str, missing))} (killed, out of memory, or waiting). "
        silent += "What is finished is kept; the same command goes on."
        text = f"{self._first_of(told).rstrip('.')}. {silent}"
        self._give_up(number, text)
        return ProcessesLost(text)

    def _give_up(self, number: int, text: str) -> None:
        with suppress(ProcessesLost):
            self._set(f"lost/{number}", text)

    def _check_lost(self, number: int) -> None:
        if self._has(f"lost/{number}"):
            raise ProcessesLost(self._get(f"lost/{number}"))

    def _set(self, key: str, text: str) -> None:
        with _reached():
            self._store.set(key, text)

    def _get(self, key: str) -> str:
        with _reached():
            return bytes(self._store.get(key)).decode()

    def _has(self, key: str) -> bool:
        with _reached():
            return bool(self._store.check([key]))


@contextmanager
def _reached() -> Iterator[None]:
    """Around a use of the store, which process 0 or the launcher holds."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessesLost(f"Process 0, or what launched it, cannot be reached any more: {error}") from error


def meet() -> Any:
    """A store of the processes' own, at the address where `torch.distributed` let them meet."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False)  # type: ignore[attr-defined]
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # a store of torchrun's outlives the processes
    return dist.PrefixStore(f"fish_tuning/{again}/{next(_numbers)}", store)  # type: ignore[attr-defined]


def _outcome(number: int, rank: int) -> str:
    return f"outcome/{number}/{rank}"


def _text(error: Exception) -> str:
    kind = "" if isinstance(error, FishTuningError) else f"{type(error).__name__}: "
    return f"{kind}{str(error).strip() or 'no message'}"
