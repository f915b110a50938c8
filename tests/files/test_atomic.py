"""Files and folders are whole or not there, whoever dies while writing them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fish_tuning.files import atomic
from fish_tuning.files.atomic import disk_full, recover_folder, whole_folder, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_folder(folder: Path, text: str) -> None:
    with whole_folder(folder) as unfinished:
        (unfinished / "sub").mkdir()
        (unfinished / "sub" / "file").write_text(text)


def leftover(folder: Path, pid: int, name: str = "tmp", host: str = atomic._HOST) -> Path:
    path = folder / (f".{host}~{pid}~0.tmp" if name == "tmp" else f".{host}~{pid}~0~{name}.old")
    path.mkdir() if name != "tmp" else path.write_text("half")
    return path


@pytest.fixture(scope="module")
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# Files


def test_file_is_written_and_replaced(tmp_path: Path) -> None:
    assert write_atomically(tmp_path / "file", b"one") == tmp_path / "file"
    write_atomically(tmp_path / "file", b"two")
    assert (tmp_path / "file").read_bytes() == b"two"
    assert names(tmp_path) == ["file"]


def test_name_as_long_as_the_disk_allows(tmp_path: Path) -> None:
    write_atomically(tmp_path / ("x" * 255), b"one")
    assert names(tmp_path) == ["x" * 255]


def test_content_reaches_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append("rename"), replace(self, to)))
    write_atomically(tmp_path / "file", b"one")
    assert [event.endswith(".tmp") for event in events] == [True, False, False]
    assert events[1:] == ["rename", str(tmp_path)]


def test_full_disk_leaves_the_old_file_and_the_type_of_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "file", b"one")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(tmp_path / "file", b"two")
    assert disk_full(caught.value) is caught.value
    assert (tmp_path / "file").read_bytes() == b"one"
    assert names(tmp_path) == ["file"]


def test_missing_folder_keeps_its_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "no" / "file", b"")


# Folders


def test_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "a" / "b", "one")
    (tmp_path / "a" / "b" / "more").write_text("of the old one")
    with whole_folder(tmp_path / "a" / "b") as unfinished:
        assert names(tmp_path / "a" / "b") == ["more", "sub"]
        (unfinished / "new").write_text("two")
    assert names(tmp_path / "a") == ["b"]
    assert names(tmp_path / "a" / "b") == ["new"]


def test_error_leaves_the_old_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "b", "one")

    def interrupted() -> None:
        with whole_folder(tmp_path / "b") as unfinished:
            (unfinished / "new").write_text("two")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == ["b"]
    assert names(tmp_path / "b") == ["sub"]


def test_folder_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("a file")
    with pytest.raises(NotADirectoryError, match=r"'.*/b'"), whole_folder(tmp_path / "b"):
        pass
    assert (tmp_path / "b").read_text() == "a file"


def test_folder_that_may_not_be_made_is_named_as_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", lambda self, *a, **k: refused(self) if self.suffix == ".tmp" else None)
        with pytest.raises(PermissionError) as raised, whole_folder(tmp_path / "adapter"):
            pass
    assert raised.value.filename == str(tmp_path / "adapter")


def test_link_to_a_folder_is_replaced_and_what_it_names_is_kept(tmp_path: Path) -> None:
    write_folder(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_folder(tmp_path / "link", "two")
    assert (tmp_path / "real" / "sub" / "file").read_text() == "one"
    assert (tmp_path / "link" / "sub" / "file").read_text() == "two"
    assert names(tmp_path) == ["link", "real"]


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "b") as one:
        (one / "file").write_text("one")
        write_folder(tmp_path / "b", "two")
        assert one.is_dir()
    assert names(tmp_path / "b") == ["file"]
    assert names(tmp_path) == ["b"]


def test_writer_that_was_overtaken_while_it_changed_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "b", "one")
    rename, overtaken = Path.rename, []

    def slow(self: Path, to: Path) -> Path:
        if to == tmp_path / "b" and not overtaken:
            overtaken.append(True)
            (tmp_path / "b").mkdir()
            (tmp_path / "b" / "other").write_text("the faster one's")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", slow)
    write_folder(tmp_path / "b", "two")
    assert names(tmp_path / "b") == ["sub"]
    assert names(tmp_path) == ["b"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken disk"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_rename_that_fails_puts_the_old_folder_back(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "b", "one")
    rename = Path.rename

    def fails(self: Path, to: Path) -> Path:
        if self.suffix == ".tmp":
            raise error
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(type(error)):
        write_folder(tmp_path / "b", "two")
    assert (tmp_path / "b" / "sub" / "file").read_text() == "one"
    assert names(tmp_path) == ["b"]


# What dead processes leave


@pytest.mark.parametrize("write", [lambda path: write_atomically(path, b""), lambda path: write_folder(path, "")])
def test_next_writer_removes_what_the_dead_left(write: Callable[[Path], object], tmp_path: Path, dead_pid: int) -> None:
    leftover(tmp_path, dead_pid)
    leftover(tmp_path, os.getpid())  # of a process that had the same number before this one
    (tmp_path / "a").mkdir()
    leftover(tmp_path, dead_pid, "a")
    kept = [
        leftover(tmp_path, os.getppid()),
        leftover(tmp_path, dead_pid, host="another-machine"),
        leftover(tmp_path, dead_pid, "b"),  # the last copy of a folder
        tmp_path / ".hidden.tmp",
    ]
    kept[-1].touch()
    write(tmp_path / "new")
    assert names(tmp_path) == sorted(["a", "new", *(path.name for path in kept)])


def test_folder_that_a_kill_took_away_comes_back(tmp_path: Path, dead_pid: int) -> None:
    (leftover(tmp_path, dead_pid, "b") / "file").write_text("one")
    leftover(tmp_path, os.getppid(), "c")
    for name in ("b", "c", "d"):
        recover_folder(tmp_path / name)
    assert (tmp_path / "b" / "file").read_text() == "one"
    assert not (tmp_path / "c").exists()  # its writer lives
    recover_folder(tmp_path / "no" / "folder")


KILLS = """
import sys
from itertools import count
from pathlib import Path
from fish_tuning.files.atomic import recover_folder, whole_folder, write_atomically
from kills import killed_at

root = Path(sys.argv[1])

def write(path, text):
    if path.name == "file":
        write_atomically(path, text.encode())
    else:
        with whole_folder(path) as unfinished:
            for name in "xyz":
                (unfinished / name).write_text(text)

def content(path):
    if path.name == "file":
        return {path.read_text()}
    recover_folder(path)
    assert sorted(file.name for file in path.iterdir()) == ["x", "y", "z"], list(path.iterdir())
    return {file.read_text() for file in path.iterdir()}

for name in ("file", "folder"):
    seen = []
    for event in count(1):
        path = root / f"{name}-{event}" / name
        path.parent.mkdir()
        write(path, "old")
        killed = killed_at(event, path.parent, lambda: write(path, "new"))
        (found,) = content(path)
        seen.append(found)
        write(path, "newer")
        assert content(path) == {"newer"}
        assert [other.name for other in path.parent.iterdir()] == [name]
        if not killed:
            break
    print(name, len(seen), "".join(text[0] for text in seen))
"""


def test_killed_at_any_moment(tmp_path: Path, python_environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path)], env=python_environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for line, fewest in zip(done.stdout.splitlines(), (4, 12), strict=True):
        _, moments, contents = line.split()
        assert int(moments) >= fewest
        assert set(contents) == {"o", "n"}  # old up to some moment, new from then on
        assert "no" not in contents
