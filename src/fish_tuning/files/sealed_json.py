"""JSON objects with a checksum of their content, so that a damaged file is not taken for another result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fish_tuning.errors import RecordError
from fish_tuning.files.atomic import write_atomically

CHECKSUM = "checksum"


def write_sealed(path: Path, content: Mapping[str, Any]) -> Path:
    """Write `content` whole or not at all, with its checksum as one more key; the same content gives the same bytes."""
    sealed = {**content, CHECKSUM: checksum(content)}
    return write_atomically(path, (json.dumps(sealed, indent=2) + "\n").encode())


def read_sealed(path: Path) -> tuple[dict[str, Any], bool]:
    """The content, and whether a checksum vouches for it; files of earlier versions have none.

    Raises:
        RecordError: the file is not JSON, holds no object, or its content is not the one that the checksum is of.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:  # not UTF-8 is a ValueError too
        raise RecordError(f"{path} is cut off, or not JSON.") from error
    if not isinstance(content, dict):
        raise RecordError(f"{path} holds no JSON object.")
    found = content.pop(CHECKSUM, None)
    try:
        damaged = found is not None and found != checksum(content)
    except (ValueError, RecursionError) as error:  # a text that is no text (half a surrogate pair), too deep
        raise RecordError(f"{path} holds what cannot be written again: {error}") from error
    if damaged:
        raise RecordError(f"{path} is damaged: its content is not the one that its checksum is of.")
    return content, found is not None


def checksum(content: Mapping[str, Any]) -> str:
    """Of the content as JSON, whatever the order of keys and the space between them."""
    plain = json.loads(json.dumps(content))  # tuples become lists, numbers as keys texts: what a reader will see
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
