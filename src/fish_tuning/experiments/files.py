"""Files that are whole or not there: an interruption leaves the previous one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomically(path: Path, data: bytes) -> Path:
    """Write a file under a name of this process, then put it in place; returns `path`."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)  # still there when the disk was full: the room is needed
    return path
