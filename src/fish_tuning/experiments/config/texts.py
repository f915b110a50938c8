"""What a text of an experiment file must not hold: characters that nobody sees, and paths that no system has."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

# C0 and C1 controls but for tab and line feed, lone halves of surrogate pairs, and marks that turn the line around.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MOST_CHARACTERS = 4096
MOST_BYTES_OF_NAME = 255  # of one part of a path, on nearly every file system
MOST_BYTES_OF_TITLE = 100  # of names that become a part of file names


def text_problems(value: Any, key: str = "") -> Iterator[str]:
    """A line for each text (key or value) of a configuration that cannot be used, however deep."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            inner = f"{key}.{visible(name)}".lstrip(".")
            if _INVISIBLE.search(name) or "\n" in name or len(name) > MOST_BYTES_OF_NAME:
                yield f"{inner.splitlines()[0][:80]}: a key that is longer than a line, or holds a control character."
                continue
            yield from text_problems(item, inner)
    elif isinstance(value, list):
        for item in value:
            yield from text_problems(item, key)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{key} is {value}: numbers must be finite."
    elif isinstance(value, str):
        if found := _INVISIBLE.search(value):
            yield f"{key} holds the control character {visible(found[0])}, which no text here needs."
        elif len(value) > MOST_CHARACTERS:
            yield f"{key} is {len(value):,} characters long; {MOST_CHARACTERS:,} are the most."


def visible(text: str) -> str:
    """The text with escapes such as `\\x1b` in the place of characters that would act on a terminal."""
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def check_path(path: str) -> str:
    """The path, if a system can have it; else ValueError."""
    for part in path.split("/"):
        if len(part.encode()) > MOST_BYTES_OF_NAME:
            raise ValueError(f"a part of the path is longer than {MOST_BYTES_OF_NAME} bytes")
    return path


def check_title(name: str) -> str:
    """The name, if it can be a part of the names of files and stay in their folder; else ValueError."""
    if not name.strip() or name.startswith(".") or "/" in name or "\\" in name:
        raise ValueError("must be a name that begins with no dot and holds no slash")
    if len(name.encode()) > MOST_BYTES_OF_TITLE:
        raise ValueError(f"must be at most {MOST_BYTES_OF_TITLE} bytes long")
    return name
