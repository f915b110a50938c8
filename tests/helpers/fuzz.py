"""What property tests share: how many examples they try, and damage to the bytes of a file.

`FISH_TUNING_EXAMPLES=2000 pytest ...` looks harder.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

DEFAULT_EXAMPLES = 25

Damage = list[tuple[str, int, bytes]]


def settings(**changes: Any) -> hypothesis_settings:
    """Settings for `@fuzz.settings()`: the same examples in every run, no time limit, nothing kept on disk."""
    defaults: dict[str, Any] = {
        "max_examples": int(os.environ.get("FISH_TUNING_EXAMPLES", DEFAULT_EXAMPLES)),
        "deadline": None,
        "derandomize": True,
        "database": None,
        # A test's tmp_path is one folder for all its examples, which is what these tests want.
        "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    }
    return hypothesis_settings(**(defaults | changes))


def damaged(whole: bytes, damage: Damage) -> bytes:
    """`whole` with bits flipped, and bytes cut off, put in or written over."""
    for kind, where, data in damage:
        at = where % (len(whole) + 1)
        if kind == "flip" and whole:
            at %= len(whole)
            whole = whole[:at] + bytes([whole[at] ^ (1 << where % 8)]) + whole[at + 1 :]
        elif kind == "cut":
            whole = whole[:at]
        elif kind == "insert":
            whole = whole[:at] + data + whole[at:]
        else:
            whole = whole[:at] + data + whole[at + len(data) :]
    return whole


damages = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "flip", "cut", "insert", "overwrite"]),
        st.integers(0, 10**6),
        st.binary(min_size=1, max_size=4) | st.sampled_from([b"9", b"[", b'"', b"{}", b"1e9", b"\\u0000"]),
    ),
    min_size=1,
    max_size=3,
)
