"""From choices and remarks to the text of an experiment file. Pure functions of plain data."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fish_tuning.experiments.config.texts import visible

WIDTH = 110
_BLOCKS = ("model", "dataset", "peft", "lora", "fish_tuning", "training", "training.args_override")  # a key a line
_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_NOT_PRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")  # in YAML
_NO_TEXTS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n", "nan", "inf")


def draft_text(head: Sequence[str], choices: Mapping[str, Any], remarks: Mapping[str, str]) -> str:
    """An experiment file: `head` as comments, then each key of `choices` below its remark.

    Example:
        >>> from fish_tuning.experiments.run.draft_text import draft_text
        >>> print(draft_text(["Mine."], {"lora": {"fish_rank": 16}}, {"lora.fish_rank": "The pool."}), end="")
        # Mine.
        <BLANKLINE>
        lora:
          # The pool.
          fish_rank: 16
    """
    lines = [f"# {one_line(line)}".rstrip() for line in head]
    for key, value in choices.items():
        lines += ["", *_key(key, value, remarks, "")]
    return "\n".join(lines) + "\n"


def _key(key: str, value: Any, remarks: Mapping[str, str], indent: str) -> Iterator[str]:
    if remark := remarks.get(key):
        for line in textwrap.wrap(one_line(remark), WIDTH - len(indent) - 2, break_on_hyphens=False):
            yield f"{indent}# {line}"
    name = key.rpartition(".")[2]
    if key in _BLOCKS and isinstance(value, Mapping) and value:
        yield f"{indent}{_scalar(name)}:"
        for inner, each in value.items():
            yield from _key(f"{key}.{inner}", each, remarks, f"{indent}  ")
    else:
        yield f"{indent}{_scalar(name)}: {yaml_text(value)}"


def yaml_text(value: Any) -> str:
    """A value in one line of YAML: JSON, but for words that need no quotes."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(str(key))}: {yaml_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(yaml_text, value))}]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _BARE.fullmatch(value) and value.lower() not in _NO_TEXTS:
        return value
    # JSON writes a character of two UTF-16 halves as two escapes, which YAML takes for two characters.
    return _NOT_PRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def one_line(text: str) -> str:
    """A text that stays in its comment, whatever a data set calls its columns and classes."""
    return " ".join(visible(text).split())


def listed(names: Sequence[Any], most: int = 12) -> str:
    """`a, b, c`, the first of many with how many more there are."""
    shown = ", ".join(text if len(text := str(name)) <= 40 else f"{text[:37]}..." for name in names[:most])
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "") if names else "none"
