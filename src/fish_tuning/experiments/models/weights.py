"""The files that a model's weights lie in, and a digest of what they hold."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers.utils.hub import cached_file

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.sections import ModelConfig
from fish_tuning.experiments.data.builtin import resolve_builtin
from fish_tuning.experiments.data.digests import file_digest
from fish_tuning.sharing.reaching import hub_arguments

# In the order in which from_pretrained looks for them.
WEIGHTS_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def weights_digest(config: ModelConfig) -> str:
    """Digest of the model's weights, wherever they lie: the same bytes have the same digest.

    The hub's cache names large files by the SHA-256 of their bytes, so such a file is not read. Weights that are not
    here yet are downloaded.
    """
    digest = hashlib.sha256()
    for path in _weight_files(config):
        blob = path.resolve()
        is_named_by_content = blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name)
        digest.update((blob.name if is_named_by_content else file_digest(path)).encode())
    return digest.hexdigest()[:16]


def _weight_files(config: ModelConfig) -> Iterator[Path]:
    folder = os.path.expanduser(resolve_builtin(config.name))
    reached = hub_arguments(
        folder, revision=config.revision, asked="model.name: ", way_out="Give a local folder's path."
    )
    for name in WEIGHTS_FILES:
        if found := _file(config, folder, name, reached):
            if found.suffix == ".json":
                parts = sorted(set(json.loads(found.read_text())["weight_map"].values()))
                yield from (_file(config, folder, part, reached, needed=True) or found for part in parts)
            else:
                yield found
            return
    raise ConfigurationError(
        f"model.name: {config.name!r} has no weights; one of {', '.join(WEIGHTS_FILES)} is needed."
    )


def _file(
    config: ModelConfig, folder: str, name: str, reached: Mapping[str, bool], needed: bool = False
) -> Path | None:
    try:
        found = cached_file(
            folder,
            name,
            revision=config.revision or "main",
            _raise_exceptions_for_missing_entries=needed,
            **reached,
        )
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigurationError(f"model.name: the weights of {config.name!r} cannot be read: {reason}") from error
    return Path(found) if found else None
