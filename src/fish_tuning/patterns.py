"""Regular expressions that come from outside: bounded in time, because some take for ever on an innocent name."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable

import regex

SECONDS = 5.0  # for one pattern on all names of a model
MOST_CHARACTERS = 1000
MOST_REPETITIONS = 100_000


def compiled(pattern: str) -> regex.Pattern[str]:
    """The pattern, compiled. Raises ValueError for what is no regular expression, or a very long one."""
    if len(pattern) > MOST_CHARACTERS:
        raise ValueError(f"a pattern of {len(pattern):,} characters; {MOST_CHARACTERS:,} are the most")
    counts = (max(1, int(count)) for count in re.findall(r"(?<=[{,])\d{1,9}(?=[},])", pattern))
    if math.prod(counts) > MOST_REPETITIONS:  # counts within counts are written out when they are compiled
        raise ValueError(f"a pattern that repeats its parts more than {MOST_REPETITIONS:,} times")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"no regular expression ({error})") from error


def matching(pattern: str, names: Iterable[str], *, whole: bool = False, seconds: float = SECONDS) -> list[str]:
    """The names that the pattern is found in; with `whole`, those that it stands for from end to end.

    The engine is that of the package regex, which reads what Python's `re` does and can be stopped.

    Raises:
        ValueError: no regular expression, or one that takes longer than `seconds` on all names together.
    """
    expression, until = compiled(pattern), time.monotonic() + seconds
    search = expression.fullmatch if whole else expression.search
    found = []
    try:
        for name in names:
            if search(name, timeout=max(0.01, until - time.monotonic())):
                found.append(name)
    except TimeoutError as error:
        raise ValueError(
            f"a regular expression that takes longer than {seconds:g} s on the names of this model; write it without "
            "repetitions inside of repetitions"
        ) from error
    return found
