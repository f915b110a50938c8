"""What came from the environment, and what is named like a secret, never leaves by a file, a page or a message.

Values of `${NAME}` are remembered while the configuration is read. What is written afterwards has `${NAME}` in their
place, so that it can be repeated where the variable is set. Keys, numbers and names that the package gives stay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

HIDDEN = "***"
_SHORTEST = 6  # characters of a value that is looked for inside of other texts: a 1 is no secret
_NAMED = re.compile(
    r"(?:^|[_.\-])(?:token|secret|password|passwd|api_?key|access_?key|private_?key|credentials?)$", re.I
)
_OF_TOKENIZERS = re.compile(r"(?:pad|eos|bos|unk|sep|cls|mask|image|video|audio)_token$", re.I)

# Keys whose values are names that the package gives: a report reads them again.
_NAMES_OF_OURS = ("protocol", "dtype", "method", "methods_to_run", "task", "metric", "score", "init_lora_weights")

_VARIABLES = re.compile(r"\$\{(\w+)\}")
_NUMBER = re.compile(r"[-+]?[\d.,]+(?:e[-+]?\d+)?", re.I)

# What was found in the environment, and what is written instead: the variable; names of ours stand for themselves.
_values: dict[str, str] = {}


def remember(variable: str, value: str, key: str = "") -> bool:
    """Note that a configuration holds, under a key, this value of an environment variable; whether it is hidden."""
    secret = is_secret_name(variable)
    if key.rpartition(".")[2] in _NAMES_OF_OURS and not secret:
        return False
    hides = len(value) >= _SHORTEST or bool(value and secret)
    if hides and (secret or not _is_secret(_values.get(value, ""))):
        _values[value] = f"${{{variable}}}"
    return hides


def remember_whole(text: str, told: str) -> None:
    """Note a text that such a value is a part of, as it is written in the file: it is known by more than the value."""
    _values.setdefault(text, told)


def keep_names(names: Iterable[str]) -> None:
    """Note names that stay as they are, whatever the environment holds: reports find runs by those of arms."""
    _values.update({name: name for name in names if name and not _is_secret(_values.get(name, ""))})


def names_of_ours(value: Any, key: str = "") -> Iterator[str]:
    """The names in a configuration that the package gives."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from names_of_ours(item, str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from names_of_ours(item, key)
    elif isinstance(value, str) and key in _NAMES_OF_OURS:
        yield value


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


def _is_secret(told: str) -> bool:
    """Whether what is written as this is a secret, not just something of this machine."""
    return told == HIDDEN or any(map(is_secret_name, _VARIABLES.findall(told)))


def scrubbed(text: str) -> str:
    """The text with `${NAME}` in the place of every remembered value, as it is or as Python and JSON quote it.

    A secret is found wherever it stands. Other values are there to make a file work on another machine: they are found
    as words of their own, not within a number, a key or an arm's name, and a number only as a part of a path.
    """
    forms: dict[str, str] = {}
    for value, told in sorted(_values.items(), key=lambda item: _is_secret(item[1])):
        forms |= dict.fromkeys((value, repr(value)[1:-1], json.dumps(value)[1:-1]), told)
    if not forms:
        return text
    # In one pass, the longest first: one value may be a part of another, or of what is written for another.
    any_of_them = re.compile("|".join(_pattern(form, forms[form]) for form in sorted(forms, key=len, reverse=True)))
    return any_of_them.sub(lambda found: forms[found[0]], text)


def _pattern(form: str, told: str) -> str:
    """Where a value is found: a long secret anywhere, others by themselves."""
    found = re.escape(form)
    if len(form) >= _SHORTEST and _is_secret(told):
        return found
    if _NUMBER.fullmatch(form):
        before, after = r"(?<=[/\\'\"])", r"(?=[/\\'\"])"
        return rf"(?<![\w.,]){found}{after}|{before}{found}(?![\w.,])"
    before = r"(?<!\w)" if re.match(r"\w", form) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", form) else ""
    return f"{before}{found}{after}"


def redacted(value: Any, key: str = "") -> Any:
    """Data for a file: texts scrubbed however deep, and what stands under a secret's name hidden; keys stay."""
    if isinstance(value, Mapping):
        return {str(name): redacted(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, key) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and is_secret_name(key):
        return HIDDEN
    if not isinstance(value, str):
        return value
    clean = _values.get(value) or scrubbed(value)  # a whole text may be a number
    return HIDDEN if clean and is_secret_name(key) and not re.fullmatch(r"\$\{\w+\}", clean) else clean
