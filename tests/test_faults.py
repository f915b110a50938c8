"""A short form of `make faults`: each way to die, a full disk, and damaged files."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Fault, Faults

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="faults are tried in forks, which this system lacks")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("faults")
        patch.setenv("HF_DATASETS_CACHE", str(root / "datasets"))
        yield Faults(root)


@pytest.mark.slow
def test_killed_runs_are_finished_by_the_next(faults: Faults) -> None:
    faults.killed(Fault(seconds=faults.seconds / 2, signal=signal.SIGTERM))
    faults.killed(Fault(event=faults.events // 2, signal=signal.SIGKILL))
    assert faults.tally.failures == []


@pytest.mark.slow
def test_a_killed_run_leaves_the_results_before_it(faults: Faults) -> None:
    for share in (0.4, 0.8):
        faults.killed_over(Fault(event=int(share * faults.events), signal=signal.SIGKILL))
    assert faults.tally.failures == []


@pytest.mark.slow
def test_one_of_two_workers_dies(faults: Faults) -> None:
    faults.two_workers(Fault(event=faults.events // 3, signal=signal.SIGKILL))
    assert faults.tally.failures == []


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_next_run_finishes(faults: Faults) -> None:
    faults.full_disk(faults.events // 2)
    assert faults.tally.failures == []
    assert str(Fault(event=1, errno=errno.ENOSPC)) == "ENOSPC at file event 1"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "fish_mask.safetensors", "lora-fish-seed1.json"])
def test_damaged_files_are_made_again(faults: Faults, name: str) -> None:
    file = next(file for file in faults.files() if file.name == name and "fish" in str(file.relative_to(faults.whole)))
    faults.damaged(file)
    assert faults.tally.failures == []
    assert Path(faults.whole).is_dir()
