from __future__ import annotations

from typing import Any

import fuzz
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fish_tuning.files.places import BITMAP, pack_places, unpack_places


@fuzz.settings()
@given(places=st.sets(st.integers(0, 500)), more=st.integers(1, 10**6))
def test_places_come_back(places: set[int], more: int) -> None:
    where = np.array(sorted(places), np.int64)
    for size in (int(where[-1]) + 1 if len(where) else 0, 500 + more):
        low, packed = pack_places(where, size)
        assert unpack_places(packed, low, len(where), size).tolist() == sorted(places)


def written_out(where: Any, low: int) -> str:
    """The code by its definition, place after place."""
    before, lowest, unary = -1, "", ""
    for place in where.tolist():
        gap, before = place - before - 1, place
        lowest += "".join(str(gap >> bit & 1) for bit in range(low))
        unary += "0" * (gap >> low) + "1"
    return lowest + unary


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.1, 0.3, 0.5, 0.9])
def test_bits_are_the_codes_and_few(share: float) -> None:
    size = 50_000
    where = np.flatnonzero(np.random.default_rng(0).random(size) < share)
    low, packed = pack_places(where, size)
    if low == BITMAP:
        assert len(packed) == size // 8
    else:
        bits = "".join(map(str, np.unpackbits(packed)))
        code = written_out(where, low)
        assert (bits[: len(code)], len(bits) - len(code) < 8) == (code, True)
        assert all(len(code) <= len(written_out(where, other)) for other in range(low + 3))
    least = -size * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8
    assert len(packed) <= (size / 8 if share > 0.4 else 1.06 * least + 4)


def test_neighbours_take_a_bit_each() -> None:
    low, packed = pack_places(np.arange(1000, 1800), 100_000)
    assert len(packed) < 300
    assert unpack_places(packed, low, 800, 100_000).tolist() == list(range(1000, 1800))


def test_positions_of_large_tensors() -> None:
    where = np.array([3, 2**33, 2**35 + 1])
    low, packed = pack_places(where, 2**36)
    assert unpack_places(packed, low, 3, 2**36).tolist() == where.tolist()


@pytest.mark.parametrize(
    ("places", "size", "change", "message"),
    [
        ([1, 5, 9], 100, {"count": 4}, "do not hold 4 places"),
        ([1, 5, 9], 100, {"count": 2}, "do not hold 2 places"),
        ([1, 5, 9], 100, {"size": 9}, "do not hold 3 places below 9"),
        ([1, 5, 9], 100, {"low": -2}, "impossible"),
        ([1, 5, 9], 100, {"low": 10**6}, "impossible"),
        ([1, 5, 9], 100, {"count": 101}, "impossible"),
        ([1, 5, 9], 100, {"packed": np.zeros(0, np.uint8)}, "do not hold 3 places"),
        ([1, 5, 9], 100, {"packed": np.zeros(20, np.uint8)}, "do not hold 3 places"),
        (range(1, 16, 2), 16, {"packed": np.zeros(3, np.uint8)}, "no bitmap of 16 entries"),
        (range(1, 16, 2), 16, {"count": 7}, "do not hold 7 places"),
    ],
)
def test_bytes_that_are_no_places_are_refused(places: Any, size: int, change: Any, message: str) -> None:
    where = np.array(list(places), np.int64)
    low, packed = pack_places(where, size)
    with pytest.raises(ValueError, match=message):
        unpack_places(**({"packed": packed, "low": low, "count": len(where), "size": size} | change))
