"""Work that several processes share: who is at what, who died of it, and a word to the user while one waits."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fish_tuning.files.atomic import write_atomically

logger = logging.getLogger(__name__)

MOST_DEATHS = 2  # of processes at one run, before it is written down as failed
WAIT_SECONDS = 2.0  # between two looks at what other processes are doing


@contextmanager
def held(lock: Path) -> Iterator[bool]:
    """Hold the lock in the block; False at once where another process holds it. A dead process holds none."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    own = FileLock(lock)
    try:
        own.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        own.release()


@contextmanager
def attempt(lock: Path, since: float) -> Iterator[int]:
    """Note beside the held lock who is at the work; gives how many before, from `since` on, died of it.

    The note goes when the block ends, whatever ends it: only a process that was killed leaves it.
    """
    note = _note(lock)
    before = [began for began in _read(note).get("began", []) if began >= since]
    content = {"process": f"{os.getpid()} on {socket.gethostname()}", "began": [*before, time.time()]}
    write_atomically(note, json.dumps(content).encode())
    try:
        yield len(before)
    finally:
        note.unlink(missing_ok=True)


class Waiting:
    """Tells what this process waits for, once for each thing, and when it goes on."""

    def __init__(self) -> None:
        self._for = ""

    def on(self, what: str, lock: Path) -> None:
        """Tell of it, and pause for a moment."""
        if what != self._for:
            holder = _read(_note(lock)).get("process")
            logger.warning(
                "Waiting for %s, which %s is at.", what, f"process {holder}" if holder else "another process"
            )
            self._for = what
        time.sleep(WAIT_SECONDS)

    def over(self) -> None:
        if self._for:
            logger.warning("Going on: %s is done.", self._for)
            self._for = ""


@contextmanager
def wait_for(lock: Path, what: str) -> Iterator[None]:
    """Hold the lock in the block, after others are done with it."""
    waiting = Waiting()
    while True:
        with held(lock) as mine:
            if mine:
                waiting.over()
                yield
                return
        waiting.on(what, lock)


def _note(lock: Path) -> Path:
    return lock.with_suffix(".holder")


def _read(note: Path) -> dict[str, Any]:
    try:
        found = json.loads(note.read_text())
    except (OSError, ValueError):  # none, or torn
        return {}
    return found if isinstance(found, dict) else {}
