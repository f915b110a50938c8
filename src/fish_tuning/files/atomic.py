"""Files that are whole or not there: an interruption leaves the previous one."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


# How libraries in Rust, safetensors among them, write an error of the system.
_OS_ERROR = re.compile(r"os error (\d+)")


def disk_full(error: BaseException) -> OSError | None:
    """The error that a full disk raises, where that is what `error` or its cause tells of; else None."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _OS_ERROR.search(str(error))):
        number = int(found.group(1))
    if number in DISK_FULL:
        return error if isinstance(error, OSError) else OSError(number, str(error))
    return disk_full(error.__cause__) if error.__cause__ else None


def write_atomically(path: Path, data: bytes) -> Path:
    """Write a file under a name of this process, then put it in place; returns `path`."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)  # still there when the disk was full: the room is needed
    return path
