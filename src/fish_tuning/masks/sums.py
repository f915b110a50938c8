"""What numbers of entries whole groups add up to, where some places must get at least so many of them.

Pure arithmetic: neither scores nor tensors. Sets of sums are the bits of one integer, in units of the sizes' common
divisor, so that what cannot be is known for certain; what a simple filling finds never gets that far.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple


class Place(NamedTuple):
    """Groups that are there, {size: number}, and how many entries of them there must be at least."""

    counts: Mapping[int, int]
    least: int


class _Settled(NamedTuple):
    """Places with groups of one size need so many of them, whichever; only those of several sizes stay open."""

    needed: int
    free: Counter[int]
    open: list[Place]
    unit: int


def can_be(total: int, places: Sequence[Place]) -> bool:
    """Whether some of the groups have `total` entries in all, and in each place at least what it must have."""
    settled = _settle(places)
    if settled is None or total < settled.needed or total % settled.unit:
        return False
    filled, free = settled.needed, Counter(settled.free)
    for place in settled.open:
        used, rest = _filled(place)
        filled += used
        free.update(rest)
    return _fill_exactly(total - filled, free) or bool(_totals(settled, total) >> (total // settled.unit) & 1)


def nearest(total: int, places: Sequence[Place]) -> list[int]:
    """The next possible number from 1 below `total` and the next above it, those of them that there are."""
    settled = _settle(places)
    if settled is None:
        return []
    unit = settled.unit
    bits = _totals(settled, sum(size * number for place in places for size, number in place.counts.items())) & ~1
    at = total // unit
    under, over = bits & ((1 << (at + 1)) - 1), bits >> (at + 1)
    below = [(under.bit_length() - 1) * unit] if under else []
    return below + ([(at + (over & -over).bit_length()) * unit] if over else [])


def _settle(places: Sequence[Place]) -> _Settled | None:
    """None where a place has less than it must have."""
    needed, free, unsettled, unit = 0, Counter[int](), [], 0
    for counts, least in places:
        there = {size: number for size, number in counts.items() if number}
        unit = math.gcd(unit, *there)
        if least > sum(size * number for size, number in there.items()):
            return None
        if least > 0 and len(there) > 1:
            unsettled.append(Place(there, least))
            continue
        free.update(there)
        if least > 0:
            (size,) = there
            number = -(-least // size)
            needed += number * size
            free[size] -= number
    return _Settled(needed, free, unsettled, unit or 1)


def _filled(place: Place) -> tuple[int, dict[int, int]]:
    """Entries of enough groups, and the groups left: large ones first, since small ones make up any rest later."""
    used, rest = 0, dict(place.counts)
    sizes = sorted(rest)
    # The last groups may go over what is needed, by little if they are small.
    for size, fits in [*((size, True) for size in reversed(sizes)), *((size, False) for size in sizes)]:
        left = place.least - used
        number = max(0, min(rest[size], left // size if fits else -(-left // size)))
        used += number * size
        rest[size] -= number
    return used, rest


def _fill_exactly(total: int, counts: Mapping[int, int]) -> bool:
    """Whether filling up with the largest that fit comes out, or with one less of one size; false proves nothing."""
    if total < 0:
        return False
    sizes = sorted((size for size, number in counts.items() if number), reverse=True)
    for spared in (0, *sizes):
        left = total
        for size in sizes:
            number = min(counts[size], left // size)
            left -= size * (number - (size == spared and number > 0))
        if not left:
            return True
    return False


def _totals(settled: _Settled, most: int) -> int:
    """Bit n is set where n units, up to `most` entries, are a possible total."""
    unit = settled.unit
    bits = _sums(settled.free, unit, most)
    for counts, least in settled.open:
        low = -(-least // unit)
        bits = _plus(bits, _sums(counts, unit, most) >> low << low) & _up_to(most // unit)
    return bits << (settled.needed // unit) & _up_to(most // unit)


def _sums(counts: Mapping[int, int], unit: int, most: int) -> int:
    bits, limit = 1, _up_to(most // unit)
    for size, number in counts.items():
        power = 1
        while number > 0:  # 1, 2, 4, ... of them, and what is left, make up every number of them
            part = min(power, number)
            bits |= bits << (part * (size // unit))
            bits &= limit
            number, power = number - part, 2 * power
    return bits


def _plus(bits: int, others: int) -> int:
    """All sums of one of each, run of set bits by run."""
    found = 0
    for start, length in _runs(others):
        run, done = bits, 1
        while done < length:
            step = min(done, length - done)
            run |= run << step
            done += step
        found |= run << start
    return found


def _runs(bits: int) -> Iterator[tuple[int, int]]:
    return ((run.start(), len(run[0])) for run in re.finditer("1+", f"{bits:b}"[::-1]))


def _up_to(bit: int) -> int:
    return (1 << (bit + 1)) - 1
