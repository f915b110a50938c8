"""Folders of adapters that are written as a whole."""

from __future__ import annotations

from pathlib import Path

from fish_tuning.errors import MaskError

_OF_ADAPTERS = "model_config"  # the one folder that lies beside an adapter's files


def check_replaceable(folder: Path) -> None:
    """MaskError where a whole new adapter would take away more than an earlier one: nothing of a user's is removed."""
    if not folder.is_dir():
        return
    found = sorted(folder.iterdir())
    others = [
        each for each in found if (each.is_dir() and each.name != _OF_ADAPTERS) or each.name == "trainer_state.json"
    ]
    if found and not (folder / "adapter_config.json").is_file():
        others = found
    if others:
        raise MaskError(
            f"{str(folder)!r} holds more than an adapter, such as {others[0].name!r}, and what is written takes the "
            "place of the whole folder. Give a new folder, or remove it first."
        )
