from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.run import locks
from fish_tuning.experiments.run.locks import attempt, held, wait_for
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.runner import run_experiment


def _hold(lock: Path, told: Connection) -> None:
    with held(lock) as mine, attempt(lock, -math.inf):
        told.send(mine)
        told.recv()


def holder(lock: Path) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    """A process that holds the lock and is at the work."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_hold, args=(lock, there))
    process.start()
    assert here.recv()
    return process, here


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    process, told = holder(lock)
    with held(lock) as mine:
        assert not mine
    told.send("go")
    process.join()
    with held(lock) as mine:
        assert mine


def test_who_died_of_the_work_is_counted_and_who_was_interrupted_is_not(tmp_path: Path) -> None:
    lock, began = tmp_path / "run.lock", time.time()
    for deaths in (0, 1, 2):
        process, _ = holder(lock)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        with held(lock) as mine:
            assert mine, "a dead process holds no lock"
        note = lock.with_suffix(".holder").read_text()
        assert note.count(", ") == 1 + deaths
    with attempt(lock, began) as before:
        assert before == 3

    def interrupted() -> None:
        with attempt(lock, began) as before:
            assert before == 0, "the last attempt came to its end"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with attempt(lock, began) as before:
        assert before == 0


def test_deaths_of_earlier_work_do_not_count(tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    process, _ = holder(lock)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    with attempt(lock, time.time()) as before:
        assert before == 0


def test_who_waits_says_for_what_and_whom_and_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.01)
    lock = tmp_path / "run.lock"
    process, told = holder(lock)
    timer = threading.Timer(0.2, told.send, ["go"])
    timer.start()
    with caplog.at_level(logging.WARNING), wait_for(lock, "lora, seed 1"):
        pass
    process.join()
    waited, went_on = [record.getMessage() for record in caplog.records]
    assert waited.startswith(f"Waiting for lora, seed 1, which process {process.pid} on ")
    assert went_on == "Going on: lora, seed 1 is done."
    caplog.clear()
    with wait_for(lock, "lora, seed 1"):
        pass
    assert not caplog.records


def test_an_experiment_waits_for_the_process_that_is_at_its_run(
    experiment: Callable[..., ExperimentConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.01)
    config = experiment("fish_tuning.methods_to_run=[lora]")
    plan = plan_experiment(config)
    process, told = holder(tmp_path / "results" / "locks" / "lora-seed1.lock")
    timer = threading.Timer(1.0, told.send, ["go"])
    timer.start()
    (record,) = run_experiment(config, plan)
    process.join()
    assert record.status == "ok"
    waited, went_on = [each.getMessage() for each in caplog.records if each.name == locks.__name__]
    assert waited.startswith(f"Waiting for lora, seed 1, which process {process.pid} on ")
    assert went_on == "Going on: lora, seed 1 is done."
