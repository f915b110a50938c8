"""What came from the environment, and what is named like a secret, never leaves by a file, a page or a message.

Values of `${NAME}` are remembered while the configuration is read. What is written afterwards has `${NAME}` in their
place, so that it can be repeated where the variable is set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_SHORTEST = 6  # characters of a value that is looked for inside of other texts: a 1 is no secret
_NAMED = re.compile(
    r"(?:^|[_.\-])(?:token|secret|password|passwd|api_?key|access_?key|private_?key|credentials?)$", re.I
)
_OF_TOKENIZERS = re.compile(r"(?:pad|eos|bos|unk|sep|cls|mask|image|video|audio)_token$", re.I)

# Keys whose values are names that the package gives: a report reads them again.
_NAMES_OF_OURS = ("protocol", "dtype", "method", "methods_to_run", "task", "metric", "score", "init_lora_weights")

_values: dict[str, str] = {}  # what was found in the environment, and the variable that it was found under


def remember(variable: str, value: str, key: str = "") -> None:
    """Note that a configuration holds, under a key, this value of an environment variable."""
    if key.rpartition(".")[2] in _NAMES_OF_OURS and not is_secret_name(variable):
        return
    if len(value) >= _SHORTEST or (value and is_secret_name(variable)):
        _values[value] = f"${{{variable}}}"


def remember_literal(key: str, value: str) -> None:
    """Note a value that is written out in a file or an override, if its key says that it is a secret."""
    if len(value) >= _SHORTEST and is_secret_name(key):
        _values.setdefault(value, HIDDEN)


def remembered() -> dict[str, str]:
    """The values, with what is written instead; for processes that do a part of the work."""
    return dict(_values)


def remember_all(values: Mapping[str, str]) -> None:
    _values.update(values)


def is_secret_name(name: str) -> bool:
    """Whether what stands under this name is a secret: `hub_token`, `api_key`, but not `pad_token`."""
    return bool(_NAMED.search(name)) and not _OF_TOKENIZERS.search(name)


def scrubbed(text: str) -> str:
    """The text with `${NAME}` in the place of every remembered value, as it is or as Python and JSON quote it."""
    forms = {
        form: told for value, told in _values.items() for form in (value, repr(value)[1:-1], json.dumps(value)[1:-1])
    }
    if not forms:
        return text
    # In one pass, the longest first: one value may be a part of another, or of what is written for another.
    any_of_them = re.compile("|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True)))
    return any_of_them.sub(lambda found: forms[found[0]], text)


def redacted(value: Any, key: str = "") -> Any:
    """Data for a file: texts scrubbed however deep, and what stands under a secret's name hidden."""
    if isinstance(value, Mapping):
        return {scrubbed(str(name)): redacted(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, key) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and is_secret_name(key):
        return HIDDEN
    if not isinstance(value, str):
        return value
    clean = scrubbed(value)
    return HIDDEN if clean and is_secret_name(key) and not re.fullmatch(r"\$\{\w+\}", clean) else clean
