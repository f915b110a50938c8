"""Whether a checkpoint ever trained the pooler that a new head reads from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from fish_tuning.experiments.config.sections import ModelConfig
from fish_tuning.experiments.data.builtin import PREFIX
from fish_tuning.experiments.models.weights import WEIGHTS_FILES

POOLER = "pool"  # poolers' names hold it, in every model of transformers that has one


def untrained_poolers(config: ModelConfig, base: Any) -> dict[str, str]:
    """The poolers of `base` (which needs no weights) that its checkpoint did not train, each with how that is seen.

    Looks at weights that lie on this machine, in safetensors; nothing is downloaded, and where none lie here nothing is
    said. Many encoders of sentences were trained without the pooler, and keep it as it was made: with a bias of zeros.
    """
    body = getattr(base, getattr(base, "base_model_prefix", ""), None)
    poolers = [name for name, _ in body.named_children() if POOLER in name] if body is not None else []
    files = _local_files(config)
    if not poolers or not files:
        return {}
    found = {}
    for pooler in poolers:
        part = dict(_tensors(files, f"{pooler}."))
        if not any(True for _ in getattr(body, pooler).parameters()):
            continue
        if not part:
            found[pooler] = "its weights are not in the checkpoint, so it would be random"
        elif _as_made(part):
            found[pooler] = "its bias is zero everywhere, as it was made"
    return found


def _as_made(tensors: Mapping[str, Tensor]) -> bool:
    biases = [value for name, value in tensors.items() if name.endswith("bias")]
    return bool(biases) and not any(bool(bias.any()) for bias in biases)


def _tensors(files: list[Path], part: str) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118  # no mapping
                if f".{part}" in f".{name}":
                    yield name, stored.get_tensor(name)


def _local_files(config: ModelConfig) -> list[Path]:
    """The safetensors files of a checkpoint, as far as they lie here."""
    if config.name.startswith(PREFIX):
        return []
    names = [name for name in WEIGHTS_FILES if "safetensors" in name]
    first = next((file for name in names if (file := _local(config, name))), None)
    if first is None or first.suffix != ".json":
        return [] if first is None or not _is_readable(first) else [first]
    try:
        parts = sorted(set(json.loads(first.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        return []
    files = [_local(config, part) for part in parts]
    return [] if None in files else [file for file in files if file is not None and _is_readable(file)]


def _is_readable(file: Path) -> bool:
    try:
        with safe_open(file, "pt"):
            return True
    except (SafetensorError, OSError):
        return False  # the run tells of it


def _local(config: ModelConfig, name: str) -> Path | None:
    try:
        found = cached_file(
            os.path.expanduser(config.name),
            name,
            revision=config.revision or "main",
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except (OSError, ValueError):
        return None
    return Path(found) if found else None
