"""Processes that are killed while they write: the n-th time that they open, rename, make or remove a file."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


def killed_at(event: int, folder: Path, action: Callable[[], object]) -> bool:
    """Run `action` in a forked process that gets SIGKILL just before its `event`-th file event in `folder`.

    Returns whether it came to that; an error of `action` itself is one here. Call it in a process without threads.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _kill_at(event, str(folder))
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            raise RuntimeError(f"The process ended with signal {os.WTERMSIG(status)}.")
        return True
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError("The action raised an error; see above.")
    return False


def _kill_at(event: int, folder: str) -> None:
    left = event

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if name in _EVENTS and str(arguments[0]).startswith(folder):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
