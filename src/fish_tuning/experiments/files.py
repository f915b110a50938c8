"""Files that are whole or not there: an interruption leaves the previous one."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> Path:
    """Write a file under a name of this process, then put it in place; returns `path`."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_bytes(data)
    unfinished.replace(path)
    return path
