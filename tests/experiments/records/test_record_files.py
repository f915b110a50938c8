"""A record is believed beside the adapter that it tells of, and beside no other, whenever a process is killed."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest
from fakes import failed, ok
from kills import killed_at

from fish_tuning.experiments.records.record_files import (
    adapter_digests,
    adapter_folder,
    find_record,
    record_file,
    relabelled,
    write_record,
)
from fish_tuning.experiments.records.run_keys import RunKeys
from fish_tuning.files.atomic import whole_folder

NOW = -math.inf


def write_run(folder: Path, key: str, content: str) -> None:
    """What a run does at its end."""
    with whole_folder(adapter_folder(folder, "lora", 1)) as unfinished:
        (unfinished / "adapter_model.safetensors").write_text(content)
        (unfinished / "adapter_config.json").write_text("{}")
        (unfinished / "fish_mask.safetensors").write_text(f"mask of {content}")
        digests = adapter_digests(unfinished)
    write_record(
        folder,
        ok("lora", 1, 0.5, config_hash=key, adapter_digest=digests.adapter, mask_digest=digests.mask),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    write_run(tmp_path, "a", "weights of a")
    return tmp_path


def damage_of(folder: Path) -> str:
    found = find_record(folder, "lora", 1, "a", NOW)
    assert found.record is None
    return found.damage


def test_a_finished_run_is_found_under_its_key_alone(folder: Path) -> None:
    found = find_record(folder, "lora", 1, "a", NOW)
    assert found.record is not None
    assert found.record.value == 0.5
    assert find_record(folder, "lora", 1, "b", NOW) == (None, "")
    assert find_record(folder, "lora", 2, "a", NOW) == (None, "")


def test_damage_is_told(folder: Path) -> None:
    adapter = adapter_folder(folder, "lora", 1)
    weights = adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert damage_of(folder) == f"the adapter in {adapter} is not the one that it wrote"
    weights.unlink()
    assert damage_of(folder) == f"the adapter in {adapter} is not the one that it wrote"
    weights.write_bytes(content)
    (adapter / "fish_mask.safetensors").unlink()
    assert damage_of(folder) == f"the mask in {adapter} is not the one that it wrote"
    adapter.rename(folder / "moved")
    assert damage_of(folder) == f"its adapter {adapter} is missing"


def test_what_a_user_adds_beside_the_adapter_is_no_damage(folder: Path) -> None:
    adapter = adapter_folder(folder, "lora", 1)
    (adapter / "README.md").write_text("mine")
    (adapter / "merged").mkdir()
    assert find_record(folder, "lora", 1, "a", NOW).record is not None


def test_a_record_without_digests_is_not_believed(folder: Path) -> None:
    write_record(folder, ok("lora", 1, 0.5, config_hash="a"))
    assert "is not the one that it wrote" in damage_of(folder)


def test_a_failure_counts_from_a_time_on(folder: Path) -> None:
    write_record(folder, failed("lora", 1))
    written = record_file(folder, "lora", 1).stat().st_mtime
    assert find_record(folder, "lora", 1, "", written - 1).record is not None
    assert find_record(folder, "lora", 1, "", written + 1).record is None


def test_no_kill_leaves_a_record_beside_another_runs_adapter(folder: Path) -> None:
    """Run A is there; run B is killed at each of its file events: A or B is found whole, never one with the other."""
    event, outcomes = 0, set()
    while True:
        event += 1
        write_run(folder, "a", "weights of a")
        killed = killed_at(event, folder, lambda: write_run(folder, "b", "weights of b"))
        for key in ("a", "b"):
            record = find_record(folder, "lora", 1, key, NOW).record
            if record is not None:
                content = (adapter_folder(folder, "lora", 1) / "adapter_model.safetensors").read_text()
                assert content == f"weights of {key}"
                outcomes.add((key, killed))
        if not killed:
            break
    assert {("a", True), ("b", False)} <= outcomes
    assert event > 10


def test_a_folder_that_a_kill_took_away_is_put_back(folder: Path) -> None:
    """A kill between the two renames leaves no adapter under its name; whoever looks for the run puts it back."""
    adapter = adapter_folder(folder, "lora", 1)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    import socket

    adapter.rename(adapter.with_name(f".{socket.gethostname()}~{child}~0~{adapter.name}.old"))
    assert find_record(folder, "lora", 1, "a", NOW).record is not None
    assert adapter.is_dir()


def test_a_found_run_bears_the_names_of_who_asks() -> None:
    keys = RunKeys("run", "setting", "common", "own")
    record = relabelled(ok("lora", 1, 0.5, experiment="old"), "new", "task", "model", keys)
    assert (record.experiment, record.task, record.model, record.value) == ("new", "task", "model", 0.5)
    assert (record.setting, record.common, record.method_own, record.config_hash) == ("setting", "common", "own", "")


def test_digests_are_of_contents(folder: Path) -> None:
    adapter = adapter_folder(folder, "lora", 1)
    before = adapter_digests(adapter)
    os.utime(adapter / "adapter_model.safetensors", (time.time() + 5, time.time() + 5))
    assert adapter_digests(adapter) == before
    assert adapter_digests(folder / "nowhere") == ("", "")
