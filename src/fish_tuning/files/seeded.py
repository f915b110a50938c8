"""Uniform numbers that a seed gives again, to the bit, on every machine and with every version of torch.

Number i of the stream of a seed and a name is SplitMix64's i-th (Steele, Lea & Flood 2014,
doi:10.1145/2714064.2660195), computed from i alone, in integers. Its upper 24 bits u give
(2u + 1 - 2**24) * (bound / 2**24): the bracket is exact in float32, so one rounded product is all the arithmetic that
there is, and IEEE 754 fixes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

SEEDS = 2**16  # so few that the seed of a tensor is found by trying
_STEP = np.uint64(0x9E3779B97F4A7C15)


def uniform(seed: int, name: str, bound: float, places: int | NDArray[np.int64]) -> NDArray[np.float32]:
    """Numbers of the stream (seed, name), uniform between -bound and bound: the first so many, or those at `places`."""
    first = _mixed(_name_number(name) + np.asarray([seed], np.uint64) * _STEP)
    return _numbers(first, bound, np.arange(places) if isinstance(places, int) else places)


def find_seed(
    name: str,
    bound: float,
    places: NDArray[np.int64],
    entries: NDArray[np.float32],
    rounded: Callable[[NDArray[np.float32]], NDArray[np.float32]],
) -> int | None:
    """The one seed below SEEDS whose stream, `rounded`, has these entries at these places; a handful is enough."""
    first = _mixed(_name_number(name) + np.arange(SEEDS, dtype=np.uint64) * _STEP)
    left = np.arange(SEEDS)
    for place, entry in zip(places, entries, strict=True):
        left = left[rounded(_numbers(first[left], bound, np.asarray([place]))) == entry]
    return int(left[0]) if len(left) == 1 else None


def _name_number(name: str) -> NDArray[np.uint64]:
    return np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], "<u8").astype(np.uint64)


def _numbers(first: NDArray[np.uint64], bound: float, places: NDArray[np.int64]) -> NDArray[np.float32]:
    upper = _mixed(first + (places.astype(np.uint64) + np.uint64(1)) * _STEP) >> np.uint64(40)
    odd = (2 * upper.astype(np.int64) + 1 - 2**24).astype(np.float32)
    return odd * np.float32(bound / 2**24)


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function; arrays of NumPy wrap around, which is meant."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
