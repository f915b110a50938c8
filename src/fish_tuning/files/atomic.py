"""Files and folders that are whole or not there: an interruption, a power cut too, leaves the previous one.

A writer works under a hidden name that holds its host and process, beside the name that it is to have. What dead
processes have left under such names, the next writer in that folder removes.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

# How libraries in Rust, safetensors among them, write an error of the system.
_OS_ERROR = re.compile(r"os error (\d+)")

# `.HOST~PID~COUNT.tmp` is unfinished; `.HOST~PID~COUNT~NAME.old` was NAME until its successor took the name.
_OWN_NAMES = re.compile(r"\.(?P<host>[^~]*)~(?P<pid>\d+)~\d+(?:\.tmp|~(?P<replaced>.+)\.old)")
_HOST = socket.gethostname().replace("~", "-").replace("/", "-")
_count = itertools.count()
_in_use: set[str] = set()  # names of this process; a dead one before it may have had the same process id


def disk_full(error: BaseException) -> OSError | None:
    """The error that a full disk raises, where that is what `error` or its cause tells of; else None."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _OS_ERROR.search(str(error))):
        number = int(found.group(1))
    if number in DISK_FULL:
        return error if isinstance(error, OSError) else OSError(number, str(error))
    return disk_full(error.__cause__) if error.__cause__ else None


def write_atomically(path: Path, data: bytes) -> Path:
    """Write a file under another name, then put it in place; returns `path`. Its folder must be there."""
    _remove_leftovers(path.parent)
    with _unfinished(path.parent) as unfinished:
        with unfinished.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    _sync(path.parent)
    return path


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new, empty folder to write into; when the block ends without an error, it takes the place of `path`.

    The previous folder `path` is removed only then, with all that it holds; after an error it is as it was, and the new
    one is gone. A kill in the moment when the two change places can leave neither under the name `path`: the next
    `whole_folder(path)` or `recover_folder(path)` puts the previous one back.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from fish_tuning.files.atomic import whole_folder
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with whole_folder(Path(parent, "adapter")) as unfinished:
        ...         _ = (unfinished / "weights").write_text("...")
        ...     sorted(file.name for file in Path(parent, "adapter").iterdir())
        ['weights']
    """
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "A folder is to be written where a file is", str(path))
    recover_folder(path)
    _remove_leftovers(path.parent)
    with _unfinished(path.parent) as unfinished:
        try:
            unfinished.mkdir()
        except OSError as error:  # which names a folder that nobody asked for
            raise OSError(error.errno, error.strerror, str(path)) from error
        yield unfinished
        sync_folder(unfinished)
        _put_in_place(unfinished, path)
        _sync(path.parent)
    _remove_leftovers(path.parent)


def recover_folder(path: str | os.PathLike[str]) -> None:
    """Where a kill took the folder `path` away before its successor was in place, put it back; else do nothing.

    For readers of folders that `whole_folder` writes. A writer that is still alive is left alone.
    """
    path = Path(os.path.abspath(path))
    if path.exists() or not path.parent.is_dir():
        return
    for replaced in sorted(path.parent.iterdir(), key=lambda found: found.name):
        parts = _OWN_NAMES.fullmatch(replaced.name)
        if parts and parts["replaced"] == path.name and not _is_in_use(replaced):
            with suppress(FileNotFoundError):  # another reader was faster
                replaced.rename(path)
            _sync(path.parent)
            return


def sync_folder(folder: Path) -> None:
    """Have the disk hold a folder with all that is in it, whoever wrote it, before anything that is done next."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))
    _sync(folder.parent)


def _put_in_place(unfinished: Path, path: Path) -> None:
    """Rename the previous folder aside, the new one in; a folder cannot be renamed onto one that holds anything."""
    while True:
        replaced = path.with_name(f"{_own_name()}~{path.name}.old")
        with _marked_as_in_use(replaced):
            try:
                with suppress(FileNotFoundError):
                    path.rename(replaced)
                unfinished.rename(path)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    continue  # another writer was faster: its folder is the previous one now
                raise
            finally:
                if replaced.exists() and not path.exists():  # an error or Ctrl-C came in between
                    replaced.rename(path)
        return


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    unfinished = folder / f"{_own_name()}.tmp"
    with _marked_as_in_use(unfinished):
        try:
            yield unfinished
        finally:
            _remove(unfinished)  # still there after an error: on a full disk the room is needed


@contextmanager
def _marked_as_in_use(path: Path) -> Iterator[None]:
    _in_use.add(path.name)
    try:
        yield
    finally:
        _in_use.discard(path.name)


def _own_name() -> str:
    return f".{_HOST}~{os.getpid()}~{next(_count)}"


def _remove_leftovers(folder: Path) -> None:
    """Remove what dead processes of this host left unfinished or replaced, but for the last copy of a folder."""
    for path in list(folder.iterdir()):
        parts = _OWN_NAMES.fullmatch(path.name)
        if parts and not _is_in_use(path) and (parts["replaced"] is None or (folder / parts["replaced"]).exists()):
            with suppress(PermissionError):  # another user's
                _remove(path)


def _is_in_use(path: Path) -> bool:
    parts = _OWN_NAMES.fullmatch(path.name)
    if parts is None or parts["host"] != _HOST:
        return True  # another machine's processes cannot be seen from here
    pid = int(parts["pid"])
    return path.name in _in_use if pid == os.getpid() else psutil.pid_exists(pid)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):  # another writer may remove the same leftover
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's names, before anything that is done next."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)
