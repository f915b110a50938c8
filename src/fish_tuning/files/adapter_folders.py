"""Folders of adapters that are written as a whole."""

from __future__ import annotations

import json
from pathlib import Path

from fish_tuning.errors import MaskError

MODEL_CONFIG = "model_config"  # the one folder that lies beside an adapter's files: AutoConfig reads it as a subfolder
LENGTH = "_fish_tuning_length"  # an attribute of a model: tokens that texts were cut to beside its adapter
_MOST_TOKENS = 10**6  # transformers writes 10**30 where there is no length


def beside_adapter(folder: Path) -> tuple[str | None, int | None]:
    """The text of the base model's configuration beside an adapter, and the length that its tokenizer cuts to."""
    config, length = folder / MODEL_CONFIG / "config.json", length_beside(folder)
    try:
        text = config.read_bytes().decode()
        return (text if isinstance(json.loads(text), dict) else None), length
    except (OSError, ValueError, RecursionError):
        return None, length


def length_beside(folder: Path) -> int | None:
    """`model_max_length` of the tokenizer beside an adapter, where it sets a bound."""
    try:
        found = json.loads((folder / "tokenizer_config.json").read_bytes()).get("model_max_length")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None
    return found if type(found) is int and 0 < found < _MOST_TOKENS else None


def check_replaceable(folder: Path) -> None:
    """MaskError where a whole new adapter would take away more than an earlier one: nothing of a user's is removed."""
    if not folder.is_dir():
        return
    found = sorted(folder.iterdir())
    others = [
        each for each in found if (each.is_dir() and each.name != MODEL_CONFIG) or each.name == "trainer_state.json"
    ]
    if found and not (folder / "adapter_config.json").is_file():
        others = found
    if others:
        raise MaskError(
            f"{str(folder)!r} holds more than an adapter, such as {others[0].name!r}, and what is written takes the "
            "place of the whole folder. Give a new folder, or remove it first."
        )
