"""Where the columns of an axis of sizes stand: in order, apart, and as near to their places as can be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

_STEP, _NARROW_STEP = 14.0, 9.5  # from one mark to the next
_AIR = 6.0  # around the marks of a column, and between columns
_DIGIT = 6.4  # width of one of a small size's name
_NOTHING = 0.14  # of the width, for the size 0


class Column(NamedTuple):
    """Where the arms of one size stand, in pixels; `place` is that of the size on the axis."""

    size: int
    place: float
    middle: float
    width: float


class Layout(NamedTuple):
    columns: list[Column]
    step: float  # from one mark of a column to the next
    named: bool  # whether there is room for every exact size
    start: float  # of the logarithmic part of the axis; before it nothing at all, size 0, has a place of its own
    limits: tuple[float, float] | None  # of that part, in sizes


def arrange(members: Mapping[int, int], width: float) -> Layout:
    """A column for each size, as near to the size's place as the others allow and never out of order.

    `members`: how many arms have each size.
    """
    sizes = sorted(members)
    step = _STEP if width > 400 else _NARROW_STEP
    widths = [members[size] * step + _AIR for size in sizes]
    with_names = [max(each, len(f"{size:,}") * _DIGIT + _AIR) for size, each in zip(sizes, widths, strict=True)]
    named = sum(with_names) + _AIR * len(sizes) < 0.8 * width
    widths = with_names if named else widths
    scale = min(1.0, width / (sum(widths) + _AIR * (len(sizes) - 1)))
    widths, gap = [scale * each for each in widths], scale * _AIR
    start = _NOTHING * width if sizes[0] == 0 else 0.0
    places, limits = _on_axis(sizes, widths, start, width)
    columns = zip(sizes, places, _apart(places, widths, gap, width), widths, strict=True)
    return Layout([Column(*each) for each in columns], scale * step, named, start, limits)


def _on_axis(
    sizes: Sequence[int], widths: Sequence[float], start: float, width: float
) -> tuple[list[float], tuple[float, float] | None]:
    """The place of each size, and the limits of a logarithmic axis that has room for the outer columns too."""
    some = [(size, column) for size, column in zip(sizes, widths, strict=True) if size]
    if not some:
        return [width / 2], None
    (smallest, first), (largest, last) = some[0], some[-1]
    left, right = start + first / 2 + _AIR, width - last / 2 - _AIR
    low, high = smallest / 2, 2.0 * largest
    if largest >= 1.2 * smallest and right > left:
        rate = math.log(largest / smallest) / (right - left)
        low, high = smallest * math.exp(-rate * (left - start)), largest * math.exp(rate * (width - right))
    across = (width - start) / math.log(high / low)
    return [start + math.log(size / low) * across if size else 0.4 * start for size in sizes], (low, high)


def _apart(places: Sequence[float], widths: Sequence[float], gap: float, width: float) -> list[float]:
    """Middles in the order of the places that leave a gap between columns and stay inside, moved as little as can be.

    Less the room that the columns before them take, middles must not fall: the nearest such numbers are the isotonic
    regression of the places.
    """
    before = [0.0]
    for one, other in pairwise(widths):
        before.append(before[-1] + (one + other) / 2 + gap)
    wanted = [place - room for place, room in zip(places, before, strict=True)]
    every = range(len(wanted))
    moved = [max(min(fmean(wanted[start : end + 1]) for end in every[n:]) for start in range(n + 1)) for n in every]
    low, high = widths[0] / 2, width - widths[-1] / 2 - before[-1]
    return [min(max(each, low), high) + room for each, room in zip(moved, before, strict=True)]
