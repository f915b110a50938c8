"""Digests of contents, whatever their paths: of data sets, files and folders."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Image


def data_digest(*splits: Dataset) -> str:
    """Digest of the contents of data sets, in order, whatever file or cache they came from."""
    digest = hashlib.sha256()
    for split in splits:
        images = [name for name, feature in split.features.items() if isinstance(feature, Image)]
        for name in images:
            split = split.cast_column(name, Image(decode=False))
        for rows in split.with_format(None).iter(batch_size=1000):
            for name in images:
                rows[name] = list(_contents(rows[name]))
            digest.update(repr(sorted(rows.items())).encode())
        digest.update(b"end of split")
    return digest.hexdigest()[:16]


def _contents(images: list[dict[str, Any]]) -> Iterator[str]:
    """Digests of image files, which a data set holds itself or names."""
    for image in images:
        data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        yield hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes; read again only when size, time of change or inode of the file are others."""
    status = path.stat()
    return _file_digest(path.resolve(), status.st_size, status.st_mtime_ns, status.st_ino)


def folder_digest(folder: Path, pattern: str = "*", leave_out: Container[str] = ()) -> str:
    """Digest of the files below a folder whose names match, by name and content; but for those in `leave_out`."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob(pattern) if path.is_file() and path.name not in leave_out):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{file_digest(path)}\0".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1024)
def _file_digest(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
