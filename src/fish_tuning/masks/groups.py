"""Entries that are kept or frozen together: rows, columns, and whole rank-1 components of LoRA.

A family holds groups of one size: group j is slice j of each of its tensors. Budgets stay exact: groups are taken in
the order of their priorities, and one is passed over only where the count could no longer come out with those left.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fish_tuning.errors import MaskError
from fish_tuning.masks.selections import Priority, priorities_of

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
        if not math.prod(shapes[name]):
            continue
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
    floors: Sequence[tuple[Collection[str], int]] = (),
) -> dict[str, Tensor]:
    """Masks of whole groups with exactly `k` entries, in the order of (priority of the mean score, seeded key, place).

    Args:
        floors: names of tensors, which share no group with others, and how many of their entries are kept at least; the
            first groups of each are taken before the rest goes to the first of all.

    Raises:
        MaskError: no set of groups has `k` entries (it names the nearest numbers), or none was found that also has
            the floors.
    """
    found = families({name: tensor.shape for name, tensor in scores.items()}, granularity)
    sizes = np.concatenate([np.full(family.number, family.size) for family in found])
    priorities = [priorities_of(priority, _means(f, scores, scales), f.members[0][0]).double() for f in found]
    values = torch.cat(priorities).numpy()
    keys = torch.randint(2**31 - 1, (len(sizes),), generator=torch.Generator().manual_seed(seed)).numpy()
    order = np.lexsort((np.arange(len(sizes)), -keys, -values))
    selected = np.zeros(len(sizes), dtype=bool)
    left, counts = k, Counter(sizes.tolist())
    later = sum(_least_of(_sizes(found, names), least) for names, least in floors)
    for names, least in floors:
        there = set(names)
        mine = order[np.concatenate([np.full(f.number, f.members[0][0] in there) for f in found])[order]]
        later -= _least_of(_sizes(found, names), least)
        chosen = mine[take_at_least(sizes[mine].tolist(), least, left, counts, later)]
        selected[chosen] = True
        left -= int(sizes[chosen].sum())
        counts -= Counter(sizes[chosen].tolist())
    rest = order[~selected[order]]
    selected[rest[take_exactly(sizes[rest].tolist(), left)]] = True

    masks = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in scores.items()}
    start = 0
    for family in found:
        groups = torch.from_numpy(selected[start : start + family.number])
        start += family.number
        for name, axis in family.members:
            _slices(masks[name], axis, family.number)[groups] = True
    return {name: mask.to(scores[name].device) for name, mask in masks.items()}


def entries_with_scores(scores: Mapping[str, Tensor], granularity: str) -> dict[str, int]:
    """For each tensor, how many of its entries are in a group that scored above zero."""
    numbers = dict.fromkeys(scores, 0)
    for family in families({name: tensor.shape for name, tensor in scores.items()}, granularity):
        alive = int(_means(family, scores, None).count_nonzero())
        for name, _ in family.members:
            numbers[name] += alive * (scores[name].numel() // family.number)
    return numbers


def _slices(tensor: Tensor, axis: int, number: int) -> Tensor:
    """(number, entries of a slice), a view of a contiguous tensor."""
    return tensor.reshape(_matrix(tensor.shape)).T if axis == _COLUMNS else tensor.reshape(number, -1)


def _means(family: Family, scores: Mapping[str, Tensor], scales: Mapping[str, float] | None) -> Tensor:
    """In fp64 on the CPU."""
    total = torch.zeros(family.number, dtype=torch.float64)
    for name, axis in family.members:
        sums = _slices(scores[name].detach(), axis, family.number).double().sum(1).cpu()
        total += sums * scales[name] if scales else sums
    return total / family.size


def check_floors(found: Sequence[Family], floors: Sequence[tuple[Collection[str], int]], k: int) -> None:
    """Raises MaskError where whole groups with these floors cannot have `k` entries, whatever the scores.

    Where a floor has groups of several sizes, only their smallest sum is looked at.
    """
    kinds = [_sizes(found, names) for names, _ in floors]
    needed = [_least_of(counts, least) for counts, (_, least) in zip(kinds, floors, strict=True)]
    left = k - sum(needed)
    if left < 0:
        raise MaskError(
            f"floors: the whole groups that meet them have {sum(needed):,} entries or more, more than the {k:,} to "
            "keep in all. Lower them, or keep more."
        )
    if floors and all(len(counts) == 1 for counts in kinds):
        free: Counter[int] = Counter()
        for family in found:
            free[family.size] += family.number
        for counts, number in zip(kinds, needed, strict=True):
            (size,) = counts
            free[size] -= number // size
        if not _can_be(left, free):
            raise MaskError("floors: " + _cannot_be(left, free.elements(), sum(needed)))


def _least_of(counts: Mapping[int, int], least: int) -> int:
    number = _least(least, counts)
    if number is None:
        raise MaskError(f"floors: {least:,} entries are asked for where there are fewer.")
    return number


def _sizes(found: Iterable[Family], names: Collection[str]) -> Counter[int]:
    counts: Counter[int] = Counter()
    there = set(names)
    for family in found:
        if family.members[0][0] in there:
            counts[family.size] += family.number
    return counts


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


def take_at_least(sizes: Sequence[int], least: int, k: int, counts: Mapping[int, int], later: int) -> list[int]:
    """Positions of the first groups that have `least` entries or more together.

    One is passed over only where it would leave too little for the rest of this floor and the `later` entries of those
    behind it, or where the `k` entries to keep in all could no longer be made up of the groups left, `counts`.

    Raises MaskError where the floor is not met in this way.
    """
    behind, left, need, free, chosen = Counter(sizes), k, least, Counter(counts), []
    for position, size in enumerate(sizes):
        if need <= 0:
            break
        behind[size] -= 1
        rest = _least(need - size, behind)
        if rest is None or size + rest + later > left:
            continue
        free[size] -= 1
        if _can_be(left - size, free):
            chosen.append(position)
            left, need = left - size, need - size
        else:
            free[size] += 1
    if need > 0:
        raise MaskError(
            f"floors: no whole groups were found that keep {least:,} entries or more where {k:,} are left to keep and "
            f"later floors need {later:,} of them. Lower the floor, keep more, or use granularity='entry'."
        )
    return chosen


def _least(number: int, counts: Mapping[int, int]) -> int | None:
    """The smallest sum of groups that is `number` or more; None where all together are fewer."""
    there = {size: n for size, n in counts.items() if n}
    if number <= 0:
        return 0
    if number > sum(size * n for size, n in there.items()):
        return None
    unit, most = math.gcd(*there), number + max(there)  # without its last group a smallest sum is below the number
    first = -(-number // unit)
    bits = _sums(there, unit, most) >> first
    return (first + (bits & -bits).bit_length() - 1) * unit


def _can_be(total: int, counts: Mapping[int, int]) -> bool:
    """Whether groups of these sizes, as many as there are of each, can add up to `total`."""
    there = sorted((size for size, number in counts.items() if number), reverse=True)
    if total <= 0 or not there:
        return total == 0
    # Nearly always one of two plain ways does it: the smallest groups alone, or as many as fit, the largest first.
    if total % there[-1] == 0 and total // there[-1] <= counts[there[-1]]:
        return True
    left = total
    for size in there:
        left -= size * min(counts[size], left // size)
    if not left:
        return True
    unit = math.gcd(*there)
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


def _cannot_be(k: int, sizes: Iterable[int], kept: int = 0) -> str:
    """What to say where no set of groups has `k` entries, beside `kept` entries of others."""
    counts = Counter(sizes)
    total = sum(size * number for size, number in counts.items())
    unit = math.gcd(*counts) if counts else 1
    bits = _sums(counts, unit, total)
    below = next((n * unit for n in range(min(k, total) // unit, -1, -1) if bits >> n & 1), 0)
    above = next((n * unit for n in range(k // unit + 1, total // unit + 1) if bits >> n & 1), None)
    kinds = ", ".join(f"{number:,} of {size:,}" for size, number in sorted(counts.items()))
    near = f"{below + kept:,}" + (f" and {above + kept:,}" if above is not None else "")
    there = f"{kinds} entries, beside {kept:,} entries of floors" if kept else f"{kinds} entries"
    return (
        f"No set of whole groups ({there}) has {k + kept:,} of the pool's {total + kept:,} entries; the nearest are "
        f"{near}, beside what trains outside the pool. Ask for one of these, or for granularity='entry'."
    )
