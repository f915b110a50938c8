"""The places of a tensor's trained entries in few bytes: one bit an entry, or Rice-coded gaps, whichever is smaller.

A gap is the number of entries between two places. Rice's code with n low bits writes the gap's n lowest bits as they
are and the rest in unary; at a random choice of a share p it needs within 2 % of the least that any code can, H(p) bits
an entry. All low bits stand before all unary ones, so that NumPy reads a whole tensor in a few calls.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]
Bytes = NDArray[np.uint8]

BITMAP = -1  # in the place of the number of low bits
_MOST_LOW_BITS = 48


def pack_places(places: Places, size: int) -> tuple[int, Bytes]:
    """Number of low bits, or BITMAP, and the bytes, for ascending positions below `size`."""
    if not len(places):
        return 0, np.zeros(0, np.uint8)
    gaps = np.diff(places, prepend=-1) - 1
    # The best number is near the logarithm of the mean gap; with gaps of very unlike length it may be any below it.
    most = int(gaps.mean() + 1).bit_length()
    lengths = {low: len(gaps) * (low + 1) + int((gaps >> low).sum()) for low in range(most + 1)}
    low = min(lengths, key=lengths.__getitem__)
    if size <= lengths[low]:
        selected = np.zeros(size, bool)
        selected[places] = True
        return BITMAP, np.packbits(selected)
    ends = np.cumsum((gaps >> low) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1, np.uint8)
    unary[ends] = 1
    lowest = ((gaps[:, None] >> np.arange(low)) & 1).astype(np.uint8).reshape(-1)
    return low, np.packbits(np.concatenate([lowest, unary]))


def unpack_places(packed: Bytes, low: int, count: int, size: int) -> Places:
    """`count` ascending positions below `size`. Raises ValueError when the bytes are not such positions."""
    if not BITMAP <= low <= _MOST_LOW_BITS or not 0 <= count <= size:
        raise ValueError(f"{count:,} places with {low} low bits in {size:,} entries are impossible")
    if low == BITMAP:
        if len(packed) != (size + 7) // 8:
            raise ValueError(f"{len(packed):,} bytes are no bitmap of {size:,} entries")
        places = np.flatnonzero(np.unpackbits(packed))
    else:
        bits = np.unpackbits(packed)
        unary = bits[count * low :]
        ends = np.flatnonzero(unary)
        if len(bits) < count * low or len(ends) != count or (len(unary) and len(unary) - ends[-1:].sum() > 8):
            raise ValueError(f"the bytes do not hold {count:,} places")
        places = ends - np.arange(count)  # the sum of all gaps' upper parts up to each place
        lowest = bits[: count * low].reshape(count, low).astype(np.int64)
        gaps = (np.diff(places, prepend=0) << low) + (lowest << np.arange(low)).sum(1)
        places = np.cumsum(gaps + 1) - 1
    if len(places) != count or (count and not 0 <= places[-1] < size):
        raise ValueError(f"the bytes do not hold {count:,} places below {size:,}")
    return places
