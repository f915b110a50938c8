"""What the runs of a folder share with one another, where their records are of a version that did not say it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fish_tuning.experiments.compare.pairs import setting_of
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.records.shared_keys import common_of_stored

# What stands in place of a record's own `common`, from the surest on: results.json lists the run, so it is one of the
# configuration there; there is none, so nothing but the folder holds its runs together; or it lists others alone.
_FROM_CONFIG, _FROM_FOLDER, _FROM_NOTHING = _GUESSED = ("config:", "folder:", "run:")


def with_common(
    runs: Sequence[RunRecord], folder: Path, listed: Any, config: Mapping[str, Any], facts: Mapping[str, Any]
) -> list[RunRecord]:
    """The runs of a folder with what they share; that of results.json counts, which is of the last configuration.

    Args:
        runs: as their files hold them.
        folder: of the experiment.
        listed: the runs of its results.json, if it has any.
        config: that it holds; empty where it holds none.
        facts: that it holds.
    """
    entries = [run for run in listed if isinstance(run, Mapping)] if isinstance(listed, list) else []
    known = {(run.get("arm"), run.get("seed"), run.get("config_hash", "")): run for run in entries}
    of_config = _FROM_CONFIG + common_of_stored(config, facts)
    found = []
    for run in runs:
        entry = known.get((run.arm, run.seed, run.config_hash), {})
        common, own = entry.get("common"), entry.get("method_own")
        if isinstance(common, str) and isinstance(own, str) and common:
            run = replace(run, common=common, method_own=own)
        elif not run.common and config and entry:
            run = replace(run, common=of_config)
        elif not run.common and config and entries:
            run = replace(run, common=f"{_FROM_NOTHING}{folder.resolve()}/{run.arm}/{run.seed}")
        elif not run.common:
            run = replace(run, common=f"{_FROM_FOLDER}{folder.resolve()}")
        found.append(run)
    return found


def settled(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs of several folders, guesses replaced by what is known.

    Runs of one arm under one setting share all else too: what one of them says holds for the others, and for whatever
    has been guessed to share it with them.
    """
    arms: dict[str, list[tuple[object, ...]]] = defaultdict(list)
    for run in runs:
        if run.status == "ok":
            arms[run.common].append((run.task, run.arm, setting_of(run)))
    known: dict[tuple[object, ...], str] = {}
    meant: dict[str, str] = {}
    for common in sorted(arms, key=_doubt):
        told = [known[arm] for arm in arms[common] if arm in known]
        meant[common] = told[0] if told and _doubt(common) else common
        for arm in arms[common]:
            known.setdefault(arm, meant[common])
    return [replace(run, common=meant.get(run.common, run.common)) for run in runs]


def _doubt(common: str) -> int:
    """0 for what a record says itself."""
    return next((place for place, guess in enumerate(_GUESSED, 1) if common.startswith(guess)), 0)
