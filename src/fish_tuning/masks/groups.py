"""Entries that are kept or frozen together: rows, columns, and whole rank-1 components of LoRA.

A family holds groups of one size: group j is slice j of each of its tensors. Budgets stay exact: groups are taken in
the order of their priorities, and one is passed over only where the count could no longer come out with those left.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fish_tuning.errors import MaskError
from fish_tuning.masks.selections import Priority

Granularity = Literal["entry", "row", "column", "component"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
Shapes = Mapping[str, Sequence[int]]

_FACTORS = (("lora_A.", "lora_B."), ("lora_embedding_A.", "lora_embedding_B."))
_ROWS, _COLUMNS = 0, 1


@dataclass(frozen=True)
class Family:
    """`number` groups of `size` entries; group j is slice j along the axis of each member, seen as a matrix."""

    members: tuple[tuple[str, int], ...]  # tensor's name and axis
    number: int
    size: int


def families(shapes: Shapes, granularity: str) -> list[Family]:
    """The groups that the tensors' entries fall into; all but the first dimension of a tensor count as its columns.

    Raises MaskError for an unknown granularity, and for tensors that are no factor of a LoRA where components are asked
    for.
    """
    if granularity == "component":
        return _components(shapes)
    if granularity not in GRANULARITIES:
        raise MaskError(f"granularity={granularity!r} is not known; allowed are {', '.join(map(repr, GRANULARITIES))}.")
    found = []
    for name in sorted(shapes):
        rows, columns = _matrix(shapes[name])
        if granularity == "entry":
            rows, columns = rows * columns, 1
        by_row = granularity != "column" or len(shapes[name]) < 2  # an entry of a vector is a row and a column
        found.append(Family(((name, _ROWS),), rows, columns) if by_row else Family(((name, _COLUMNS),), columns, rows))
    return found


def _components(shapes: Shapes) -> list[Family]:
    found, seen = [], set()
    for name in sorted(shapes):
        other = next((name.replace(a, b) for a, b in _FACTORS if a in name), None)
        if other is None or other not in shapes:
            continue
        (rank, width), (height, columns) = _matrix(shapes[name]), _matrix(shapes[other])
        if rank != columns:
            raise MaskError(f"granularity='component': {name!r} has {rank} rows, {other!r} {columns} columns.")
        found.append(Family(((name, _ROWS), (other, _COLUMNS)), rank, width + height))
        seen |= {name, other}
    odd = [name for name in sorted(shapes) if name not in seen]
    if odd:
        raise MaskError(
            f"granularity='component': {odd[0]!r} is no factor of a LoRA pair in the pool, and so are {len(odd) - 1} "
            "others. Components are row j of lora_A with column j of lora_B; put other tensors into names_to_exclude "
            "or set requires_grad_(False) on them before scoring, or use granularity='row'."
        )
    return found


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0] if shape else 1, math.prod(shape[1:])


def select_groups(
    scores: Mapping[str, Tensor],
    k: int,
    granularity: str,
    *,
    priority: Priority,
    seed: int = 0,
    scales: Mapping[str, float] | None = None,
    taken: Mapping[str, Tensor] | None = None,
    at_least: bool = False,
) -> dict[str, Tensor]:
    """Masks of whole groups with exactly `k` entries, in the order of (priority of the mean score, seeded key, place).

    Args:
        taken: entries that are chosen already; their groups are left out.
        at_least: take groups until there are `k` entries or more.

    Raises:
        MaskError: no set of groups has `k` entries; it names the nearest numbers.
    """
    found = families({name: tensor.shape for name, tensor in scores.items()}, granularity)
    means = [_means(family, scores, scales) for family in found]
    sizes = np.concatenate([np.full(family.number, family.size) for family in found])
    values = torch.cat([priority(mean) for mean in means]).numpy()
    keys = torch.randint(2**31 - 1, (len(sizes),), generator=torch.Generator().manual_seed(seed)).numpy()
    order = np.lexsort((np.arange(len(sizes)), -keys, -values))
    if taken is not None:
        free = ~np.concatenate([_taken(family, taken) for family in found])
        order = order[free[order]]
    ordered = sizes[order].tolist()
    chosen = _until(ordered, k) if at_least else take_exactly(ordered, k)
    selected = np.zeros(len(sizes), dtype=bool)
    selected[order[chosen]] = True
    masks = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in scores.items()}
    start = 0
    for family in found:
        groups = torch.from_numpy(selected[start : start + family.number])
        start += family.number
        for name, axis in family.members:
            view = (
                masks[name].view(_matrix(masks[name].shape))
                if axis == _COLUMNS
                else masks[name].view(family.number, -1)
            )
            (view.T if axis == _COLUMNS else view)[groups] = True
    return {name: mask.to(scores[name].device) for name, mask in masks.items()}


def _slices(name: str, axis: int, tensors: Mapping[str, Tensor], number: int) -> Tensor:
    """(number, entries of a slice)."""
    tensor = tensors[name]
    return tensor.reshape(_matrix(tensor.shape)).T if axis == _COLUMNS else tensor.reshape(number, -1)


def _means(family: Family, scores: Mapping[str, Tensor], scales: Mapping[str, float] | None) -> Tensor:
    """In fp64 on the CPU."""
    total = torch.zeros(family.number, dtype=torch.float64)
    for name, axis in family.members:
        sums = _slices(name, axis, scores, family.number).double().sum(1).cpu()
        total += sums * scales[name] if scales else sums
    return total / family.size


def _taken(family: Family, taken: Mapping[str, Tensor]) -> np.ndarray:
    gone = torch.zeros(family.number, dtype=torch.bool)
    for name, axis in family.members:
        gone |= _slices(name, axis, taken, family.number).any(1).cpu()
    return gone.numpy()


def take_exactly(sizes: Sequence[int], k: int) -> list[int]:
    """Positions of the groups to take, in their order, so that their sizes add up to `k` exactly.

    A group is passed over only where no set of those behind it could make up the rest. Raises MaskError where no set of
    all of them could.
    """
    left, counts, chosen = k, Counter(sizes), []
    if not _can_be(left, counts):
        raise MaskError(_cannot_be(k, sizes))
    for position, size in enumerate(sizes):
        if not left:
            break
        counts[size] -= 1
        if size <= left and _can_be(left - size, counts):
            chosen.append(position)
            left -= size
    return chosen


def _until(sizes: Sequence[int], k: int) -> list[int]:
    total, chosen = 0, []
    for position, size in enumerate(sizes):
        if total >= k:
            break
        chosen.append(position)
        total += size
    return chosen


def _can_be(total: int, counts: Mapping[int, int]) -> bool:
    """Whether groups of these sizes, as many as there are of each, can add up to `total`."""
    there = [size for size, number in counts.items() if number]
    smallest = min(there, default=1)
    if total % smallest == 0 and total // smallest <= counts.get(smallest, 0):
        return True
    unit = math.gcd(*there) if there else 1
    return total % unit == 0 and bool(_sums(counts, unit, total) >> (total // unit) & 1)


def _sums(counts: Mapping[int, int], unit: int, most: int) -> int:
    """Bit n is set where n units, up to `most` entries, can be made up."""
    bits, limit = 1, (1 << (most // unit + 1)) - 1
    for size, number in counts.items():
        power = 1
        while number:  # 1, 2, 4, ... of them, and what is left, make up every number of them
            part = min(power, number)
            bits |= bits << (part * (size // unit))
            bits &= limit
            number, power = number - part, 2 * power
    return bits


def _cannot_be(k: int, sizes: Iterable[int]) -> str:
    counts = Counter(sizes)
    total = sum(size * number for size, number in counts.items())
    unit = math.gcd(*counts) if counts else 1
    bits = _sums(counts, unit, total)
    below = next((n * unit for n in range(min(k, total) // unit, -1, -1) if bits >> n & 1), 0)
    above = next((n * unit for n in range(k // unit + 1, total // unit + 1) if bits >> n & 1), None)
    kinds = ", ".join(f"{number:,} of {size:,}" for size, number in sorted(counts.items()))
    near = f"{below:,}" + (f" and {above:,}" if above is not None else "")
    return (
        f"No set of whole groups ({kinds} entries) has {k:,} of the pool's {total:,} entries; the nearest are {near}, "
        "beside what trains outside the pool. Ask for one of these, or for granularity='entry'."
    )
