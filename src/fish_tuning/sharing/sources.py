"""What an adapter is read from: a folder, or the file of a sparse adapter, of which a folder is made meanwhile."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fish_tuning.sparse.sparse_adapters import write_adapter_folder


@contextmanager
def adapter_folder(source: str | os.PathLike[str]) -> Iterator[str | os.PathLike[str]]:
    """`source` itself; where it is a sparse adapter's file, the ordinary folder that it stands for, for a while."""
    if not Path(source).is_file():
        yield source
        return
    with tempfile.TemporaryDirectory() as parent:
        write_adapter_folder(source, Path(parent, "adapter"))
        yield Path(parent, "adapter")
