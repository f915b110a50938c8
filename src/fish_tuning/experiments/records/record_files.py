"""Records on disk, each beside the adapter that it tells of; a record is believed while the two belong together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fish_tuning.errors import RecordError
from fish_tuning.experiments.data.digests import file_digest, folder_digest
from fish_tuning.experiments.records.run_record import RunRecord, scrubbed_record
from fish_tuning.files.atomic import recover_folder
from fish_tuning.files.delta_file import DELTA_FILE_NAME
from fish_tuning.files.mask_file import MASK_FILE_NAME
from fish_tuning.files.sealed_json import read_sealed, write_sealed

if TYPE_CHECKING:  # it needs torch, which reports do without
    from fish_tuning.experiments.records.run_keys import RunKeys

_ADAPTER_FILES = "adapter_*"  # as PEFT names them; whatever else lies there is the user's own


class Digests(NamedTuple):
    """Of an adapter's files and of the mask beside it; empty where there is none."""

    adapter: str = ""
    mask: str = ""


class Found(NamedTuple):
    """The record that stands for a run, or None; `damage` says why a finished run's record cannot be believed."""

    record: RunRecord | None = None
    damage: str = ""


def run_name(arm: str, seed: int) -> str:
    """What a run's files are called."""
    return f"{arm}-seed{seed}"


def record_file(folder: Path, arm: str, seed: int) -> Path:
    return folder / "runs" / f"{run_name(arm, seed)}.json"


def adapter_folder(folder: Path, arm: str, seed: int) -> Path:
    return folder / "adapters" / run_name(arm, seed)


def adapter_digests(adapter: Path) -> Digests:
    """Of the adapter that lies there now, or the delta of a model without PEFT."""
    if not adapter.is_dir():
        return Digests()
    mask = adapter / MASK_FILE_NAME
    return Digests(
        folder_digest(adapter, DELTA_FILE_NAME if (adapter / DELTA_FILE_NAME).is_file() else _ADAPTER_FILES)[:16],
        file_digest(mask)[:16] if mask.is_file() else "",
    )


def write_record(folder: Path, record: RunRecord) -> RunRecord:
    """Put the record in its place; its adapter must be in its own already."""
    path = record_file(folder, record.arm, record.seed)
    write_sealed(path, scrubbed_record(record).to_dict())
    return record


def find_record(folder: Path, arm: str, seed: int, key: str, failed_since: float) -> Found:
    """The record of a run with this key that has finished and whose adapter is whole, or that has failed since a time.

    Args:
        folder: the experiment's output folder.
        arm: the run's arm.
        seed: the run's seed.
        key: of all that the run depends on; a record of another key is another run's.
        failed_since: as `time.time()` gives it; failures before that are to be tried again.
    """
    path = record_file(folder, arm, seed)
    try:
        content, _ = read_sealed(path)
        record = RunRecord.from_dict(content)
        written = path.stat().st_mtime
    except FileNotFoundError:
        return Found()
    except RecordError as error:
        return Found(damage=str(error).removesuffix("."))
    except (OSError, ValueError, TypeError, AttributeError):  # not a record
        return Found()
    if (record.config_hash, record.arm, record.seed) != (key, arm, seed):
        return Found()
    if record.status != "ok":
        return Found(record if written >= failed_since else None)
    adapter = adapter_folder(folder, arm, seed)
    recover_folder(adapter)
    damage = _damage(record, adapter)
    return Found(damage=damage) if damage else Found(record)


def relabelled(record: RunRecord, experiment: str, task: str, model: str, keys: RunKeys) -> RunRecord:
    """A finished run under the names of the experiment that asks for it: a key holds contents, not names.

    What it shares with other arms and seeds is the asking experiment's too: its list of learning rates may be longer
    now, and records of earlier versions do not say it.
    """
    return replace(
        record,
        experiment=experiment,
        task=task,
        model=model,
        setting=keys.setting,
        common=keys.common,
        method_own=keys.method_own,
    )


def _damage(record: RunRecord, adapter: Path) -> str:
    found = adapter_digests(adapter)
    if not found.adapter:
        return f"its adapter {adapter} is missing"
    if found.adapter != record.adapter_digest:
        return f"the adapter in {adapter} is not the one that it wrote"
    if found.mask != record.mask_digest:
        return f"the mask in {adapter} is not the one that it wrote"
    return ""
