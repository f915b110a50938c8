"""Faults on purpose: runs that are killed, files that are cut or flipped, disks that are full.

`python tests/helpers/faults.py --kills 200` prints what was tried and what survived; the tests run a short form.

The command is run in forks of one process that has imported everything, so that a run takes a second. A fork dies
by a signal at a random moment or at its k-th file event (Python's audit events tell of them: files opened for writing,
renamed, removed, folders made), or the k-th of them finds the disk full. Then the same command is run again, unharmed,
and everything is compared with a run that nothing has happened to.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    for name, value in {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
        os.environ.setdefault(name, value)

import yaml
from folders import write_bert, write_sentences
from tqdm import tqdm

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")


@dataclass
class Tally:
    """What was tried of each kind of fault, and what did not survive."""

    tried: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, kind: str, problems: list[str]) -> None:
        self.tried[kind] = self.tried.get(kind, 0) + 1
        self.failures += [f"{kind}: {problem}" for problem in problems]


@dataclass(frozen=True)
class Fault:
    """What happens to a run: at its `event`-th file event, or after `seconds`, a signal or an error."""

    event: int | None = None
    seconds: float | None = None
    signal: int | None = None
    errno: int | None = None

    def __str__(self) -> str:
        what = signal.Signals(self.signal).name if self.signal else errno.errorcode[self.errno or 0]
        return f"{what} " + (f"at file event {self.event}" if self.event is not None else f"after {self.seconds:.2f} s")


class Laboratory:
    """A tiny experiment of two arms in a folder of its own, and what it gives when nothing happens."""

    def __init__(self, root: Path) -> None:
        self.root = root
        model, data = write_bert(root / "bert"), write_sentences(root / "reviews")
        self.config = root / "faults.yaml"
        training = {"max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True, "learning_rate": 1e-3}
        content = {
            "model": {"name": str(model)},
            "dataset": {"load_args": [str(data)], "max_validation_samples": 8},
            "lora": {"baseline_rank": 1, "fish_rank": 2, "init_lora_weights": "pissa"},
            "fish_tuning": {"num_samples": 4, "methods_to_run": ["lora", "lora-fish"]},
            "training": {"args_override": training},
            "seeds": [1],
        }
        self.config.write_text(yaml.safe_dump(content))
        self.number = 0

    def folder(self) -> Path:
        self.number += 1
        return self.root / f"results{self.number}"

    def command(self, folder: Path, *overrides: str) -> Callable[[], int]:
        def run() -> int:
            from fish_tuning.cli import run_command

            return run_command(str(self.config), [f"training.output_dir={folder}", *overrides])

        return run


def watched(folder: Path, fault: Fault) -> None:
    """From here on, count this process's file events in `folder`, and let the fault happen at its event."""
    inside, count = str(folder), [0]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            _, _, flags = args
            counts = isinstance(flags, int) and bool(flags & _WRITING)
        else:
            counts = event in _EVENTS
        if not counts or not str(args[0]).startswith(inside):
            return
        count[0] += 1
        if count[0] != fault.event:
            return
        if fault.errno is not None:
            raise OSError(fault.errno, os.strerror(fault.errno), str(args[0]))
        os.kill(os.getpid(), fault.signal or signal.SIGKILL)

    sys.addaudithook(hook)


def fork(work: Callable[[], int], log: Path, fault: Fault | None = None, folder: Path | None = None) -> int:
    """Run `work` in a fork; its exit code, or minus the signal that ended it."""
    child = start(work, log, fault, folder)
    if fault is not None and fault.seconds is not None:
        time.sleep(fault.seconds)
        os.kill(child, fault.signal or signal.SIGKILL)
    return ended(child)


def start(work: Callable[[], int], log: Path, fault: Fault | None = None, folder: Path | None = None) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if fault is not None and fault.event is not None and folder is not None:
            watched(folder, fault)
        code = work()
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException as error:
        code = getattr(error, "exit_code", 99)  # typer's Exit
        if code == 99:
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, seconds: float = 120.0) -> int:
    """The exit code of a fork; one that does not end in time is killed, and counts as hung (-99)."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -99


def outcome(folder: Path) -> dict[str, Any]:
    """What a folder says and holds: every run's score, and the bytes of its adapter and mask."""
    found: dict[str, Any] = {}
    for path in sorted((folder / "runs").glob("*.json")):
        record = json.loads(path.read_text())
        record = record.get("record", record)
        adapter = folder / "adapters" / path.stem
        files = {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(adapter.rglob("*.safetensors"))
            if file.is_file()
        }
        found[path.stem] = (record["status"], record["value"], files)
    return found


def unfinished(folder: Path) -> list[str]:
    """Temporary files and folders that nobody will use again."""
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.name.startswith(".") and not path.name.endswith(".lock")
    ]


def problems_of(folder: Path, expected: dict[str, Any], code: int, log: Path) -> list[str]:
    """How a folder differs from what it must be after an unharmed run."""
    problems = []
    if code != 0:
        problems.append(f"the next run ended with {code}: {log.read_text()[-600:]}")
    try:
        found = outcome(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [*problems, f"records cannot be read: {error!r}"]
    if found != expected:
        problems.append(f"other results: {found} instead of {expected}")
    if left := unfinished(folder):
        problems.append(f"left over: {left}")
    for name in ("results.json", "results.csv", "results.md"):
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
    return problems


class Faults:
    """Every kind of fault on one laboratory."""

    def __init__(self, root: Path, seed: int = 0) -> None:
        self.laboratory, self.random, self.tally = Laboratory(root), random.Random(seed), Tally()
        self.log, self.after_log = root / "log.txt", root / "after.txt"
        self.whole = self.laboratory.folder()
        began = time.monotonic()
        code = fork(self.laboratory.command(self.whole), self.log)
        if code != 0:
            raise RuntimeError(f"the run that nothing happens to ended with {code}: {self.log.read_text()}")
        self.seconds = time.monotonic() - began
        self.expected = outcome(self.whole)
        self.events = self._count_events()

    def _count_events(self) -> int:
        """How many file events a run has: that of the first event that does not come."""
        folder, counter = self.laboratory.folder(), self.laboratory.root / "count.txt"

        def counting() -> int:
            seen = [0]

            def hook(event: str, args: tuple[Any, ...]) -> None:
                writing = event == "open" and isinstance(args[2], int) and bool(args[2] & _WRITING)
                if (writing or event in _EVENTS) and str(args[0]).startswith(str(folder)):
                    seen[0] += 1

            sys.addaudithook(hook)
            code = self.laboratory.command(folder)()
            counter.write_text(str(seen[0]))
            return code

        fork(counting, self.log)
        shutil.rmtree(folder, ignore_errors=True)
        return int(counter.read_text())

    def killed(self, fault: Fault) -> None:
        """A first run dies; the next one must finish it."""
        folder = self.laboratory.folder()
        fork(self.laboratory.command(folder), self.log, fault, folder)
        self._compare(f"killed: {fault}", folder)

    def killed_over(self, fault: Fault) -> None:
        """Over finished results a run with another learning rate dies; the first command must give the first ones."""
        folder = self._copy()
        fork(self.laboratory.command(folder, "training.args_override.learning_rate=5e-3"), self.log, fault, folder)
        self._compare(f"killed over other results: {fault}", folder)

    def two_workers(self, fault: Fault) -> None:
        """Two processes on one folder, of which one dies."""
        folder = self.laboratory.folder()
        first = start(self.laboratory.command(folder), self.after_log)
        fork(self.laboratory.command(folder), self.log, fault, folder)
        code = ended(first)
        self.tally.add("two workers", problems_of(folder, self.expected, code, self.after_log))
        shutil.rmtree(folder, ignore_errors=True)

    def full_disk(self, event: int) -> None:
        """The disk is full at one event: exit code 1, then the next run finishes."""
        folder = self.laboratory.folder()
        fault = Fault(event=event, errno=errno.ENOSPC)
        code = fork(self.laboratory.command(folder), self.log, fault, folder)
        told = self.log.read_text()
        wrong = [] if code in (0, 1) and "Traceback" not in told else [f"{fault} ended with {code}: {told[-800:]}"]
        self.tally.add("full disk told", wrong)
        self._compare(f"full disk: {fault}", folder)

    def damaged(self, file: Path) -> None:
        """A file of finished results is cut or has a bit flipped: it is noticed and made again, or does not matter."""
        folder = self._copy()
        target = folder / file.relative_to(self.whole)
        data = bytearray(target.read_bytes())
        if not data:
            return
        cut = self.random.random() < 0.3
        if cut:
            del data[self.random.randrange(len(data)) :]
        else:
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        target.write_bytes(data)
        for command in (self._report(folder), self._inspect(folder)):
            code = fork(command, self.log)
            told = self.log.read_text()
            bad = code not in (0, 1, 2) or "Traceback" in told
            self.tally.add("damaged, read", [f"{file.name}: {code}: {told[-800:]}"] if bad else [])
        self._compare(f"damaged: {file.name}, {'cut' if cut else 'flipped'}", folder)

    def _report(self, folder: Path) -> Callable[[], int]:
        def report() -> int:
            from typer.testing import CliRunner

            from fish_tuning.cli import app

            result = CliRunner().invoke(app, ["report", str(folder)])
            sys.stdout.write(result.output)
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                traceback.print_exception(result.exception)
            return result.exit_code

        return report

    def _inspect(self, folder: Path) -> Callable[[], int]:
        def inspect() -> int:
            from typer.testing import CliRunner

            from fish_tuning.cli import app

            names = sorted(str(path) for path in (folder / "adapters").iterdir() if path.is_dir())
            result = CliRunner().invoke(app, ["inspect", *names])
            sys.stdout.write(result.output)
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                traceback.print_exception(result.exception)
            return result.exit_code

        return inspect

    def _copy(self) -> Path:
        folder = self.laboratory.folder()
        shutil.copytree(self.whole, folder)
        return folder

    def _compare(self, kind: str, folder: Path) -> None:
        code = fork(self.laboratory.command(folder), self.after_log)
        problems = problems_of(folder, self.expected, code, self.after_log)
        self.tally.add(kind.partition(":")[0], [f"{kind}: {problem}" for problem in problems])
        shutil.rmtree(folder, ignore_errors=True)

    def moments(self, number: int) -> Iterator[Fault]:
        """Half at file events, spread over all of them, half at random times; signals in turn."""
        for index in range(number):
            chosen = SIGNALS[index % 4 % 3]  # SIGKILL twice as often
            if index % 2:
                yield Fault(event=self.random.randrange(1, self.events + 1), signal=chosen)
            else:
                yield Fault(seconds=self.random.uniform(0, self.seconds), signal=chosen)

    def files(self) -> list[Path]:
        return [path for path in sorted(self.whole.rglob("*")) if path.is_file() and "locks" not in path.parts]


def run_all(root: Path, kills: int, damages: int, seed: int = 0) -> Tally:
    """`kills` runs that die in one of three ways, full disks at a quarter as many events, and `damages` files."""
    faults = Faults(root, seed)
    ways = (faults.killed, faults.killed_over, faults.two_workers)
    for index, fault in enumerate(tqdm(list(faults.moments(kills)), desc="kills", disable=None)):
        ways[index % 4 % 3](fault)
    for _ in tqdm(range(kills // 4), desc="full disks", disable=None):
        faults.full_disk(faults.random.randrange(1, faults.events + 1))
    files = faults.files()
    for index in tqdm(range(damages), desc="damaged files", disable=None):
        faults.damaged(files[index % len(files)])
    return faults.tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    import fish_tuning.experiments.report.page  # imported once, before the forks
    import fish_tuning.experiments.run.runner  # noqa: F401

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        os.environ["HF_DATASETS_CACHE"] = f"{root}/datasets"
        tally = run_all(Path(root), asked.kills, asked.damages, asked.seed)
    for kind, number in tally.tried.items():
        failed = sum(failure.startswith(f"{kind}:") for failure in tally.failures)
        print(f"{kind:<28} tried {number:>4}   survived {number - failed:>4}")
    print(f"{sum(tally.tried.values())} checks in {(time.monotonic() - began) / 60:.1f} minutes")
    for failure in tally.failures:
        print(f"FAILED {failure}")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
