"""Entries that are kept or frozen together: rows, columns, and whole rank-1 components of LoRA.

A family holds groups of one size: group j is slice j of each of its tensors. Budgets stay exact: groups are taken in
the order of their priorities, and one is passed over only where the count could no longer come out with those left.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fish_tuning.devices import in_float64
from fish_tuning.errors import MaskError
from fish_tuning.masks.selections import Priority, priorities_of
from fish_tuning.masks.sums import Place, can_be, nearest

Granularity = Literal["entry", "row", "column", "component"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
Shapes = Mapping[str, Sequence[int]]
Floors = Sequence[tuple[Sequence[str], int]]

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

    A tensor without entries has no groups.

    Raises MaskError for an unknown granularity, and for tensors that are no factor of a LoRA where components are asked
    for.
    """
    shapes = {name: shape for name, shape in shapes.items() if math.prod(shape)}
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


def check_groups(found: Sequence[Family], k: int, floors: Floors = ()) -> None:
    """Refuse, without any scores, a number `k` of entries that no set of whole groups has.

    Raises MaskError, which names the sizes of the groups and the nearest numbers.
    """
    counts = [Counter[int]() for _ in range(len(floors) + 1)]
    for family, place in zip(found, _places(found, floors), strict=True):
        counts[place][family.size] += family.number
    _check_places(k, [Place(count, least) for count, least in zip(counts, _least(floors), strict=True)])


def select_groups(
    scores: Mapping[str, Tensor],
    k: int,
    granularity: str,
    *,
    priority: Priority,
    seed: int = 0,
    scales: Mapping[str, float] | None = None,
    floors: Floors = (),
) -> dict[str, Tensor]:
    """Masks of whole groups with exactly `k` entries, in the order of (priority of the mean score, seeded key, place).

    Args:
        floors: names of tensors, and how many entries are kept of them at least. Groups of those that have fewer come
            before all others.

    Raises:
        MaskError: no set of groups has `k` entries and meets the floors; it names the nearest numbers.
    """
    found = families({name: tensor.shape for name, tensor in scores.items()}, granularity)
    if not found:  # tensors without entries alone
        return {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in scores.items()}
    numbers = [family.number for family in found]
    sizes = np.repeat([family.size for family in found], numbers)
    places = np.repeat(_places(found, floors), numbers)
    values = torch.cat([_priorities(family, scores, scales, priority) for family in found]).numpy()
    keys = torch.randint(2**31 - 1, (len(sizes),), generator=torch.Generator().manual_seed(seed), device="cpu").numpy()
    order = np.lexsort((np.arange(len(sizes)), -keys, -values))
    least = [number for _, number in floors]
    selected = np.zeros(len(sizes), dtype=bool)
    selected[order[take_exactly(sizes[order].tolist(), k, places[order].tolist(), least)]] = True
    masks = {name: torch.zeros(tensor.shape, dtype=torch.bool, device="cpu") for name, tensor in scores.items()}
    for family, groups in zip(found, torch.from_numpy(selected).split(numbers), strict=True):
        for name, axis in family.members:
            _slices(name, axis, masks, family.number)[groups] = True
    return {name: mask.to(scores[name].device) for name, mask in masks.items()}


def entries_with_scores(scores: Mapping[str, Tensor], granularity: str) -> dict[str, int]:
    """For each tensor, how many of its entries are in a group that scored above zero."""
    if granularity == "entry":
        return {name: int(tensor.count_nonzero()) for name, tensor in scores.items()}
    numbers = dict.fromkeys(scores, 0)
    for family in families({name: tensor.shape for name, tensor in scores.items()}, granularity):
        scored = int(_scored(family, scores).count_nonzero())
        for name, _ in family.members:
            numbers[name] = scored * (scores[name].numel() // family.number)
    return numbers


def chosen_at_random(scores: Mapping[str, Tensor], mask: Mapping[str, Tensor], granularity: str) -> int:
    """Entries of the mask that were judged by a score of exactly 0, their group's."""
    if granularity == "entry":
        chunks = ((s, m) for n in scores for s, m in zip(_chunks(scores[n]), _chunks(mask[n]), strict=True))
        return sum(int((kept & (score == 0)).count_nonzero()) for score, kept in chunks)
    number = 0
    for family in families({name: tensor.shape for name, tensor in scores.items()}, granularity):
        name, axis = family.members[0]
        kept = _slices(name, axis, mask, family.number).any(1).cpu()
        number += family.size * int((kept & ~_scored(family, scores)).count_nonzero())
    return number


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Bounds the extra memory."""
    chunks: tuple[Tensor, ...] = tensor.detach().reshape(-1).split(2**20)
    return chunks


def _scored(family: Family, scores: Mapping[str, Tensor]) -> Tensor:
    """For each group, whether any of its entries has a score above zero."""
    return torch.stack([_slices(n, axis, scores, family.number).any(1).cpu() for n, axis in family.members]).any(0)


def _places(found: Sequence[Family], floors: Floors) -> list[int]:
    """Which floor each family is under; the number of floors for those under none."""
    of = {name: place for place, (names, _) in enumerate(floors) for name in names}
    return [of.get(family.members[0][0], len(floors)) for family in found]


def _least(floors: Floors) -> list[int]:
    return [*(number for _, number in floors), 0]


def _slices(name: str, axis: int, tensors: Mapping[str, Tensor], number: int) -> Tensor:
    """(number, entries of a slice); a view of the tensor where its layout allows."""
    tensor = tensors[name].detach()
    return tensor.reshape(_matrix(tensor.shape)).T if axis == _COLUMNS else tensor.reshape(number, -1)


def _priorities(
    family: Family, scores: Mapping[str, Tensor], scales: Mapping[str, float] | None, priority: Priority
) -> Tensor:
    """Of the mean scores, in fp64 on the CPU."""
    total = torch.zeros(family.number, dtype=torch.float64, device="cpu")
    for name, axis in family.members:
        sums = in_float64(_slices(name, axis, scores, family.number)).sum(1).cpu()
        total += sums * scales[name] if scales else sums
    return in_float64(priorities_of(priority, total / family.size, family.members[0][0]))


def take_exactly(
    sizes: Sequence[int], k: int, places: Sequence[int] | None = None, floors: Sequence[int] = ()
) -> list[int]:
    """Positions of the groups to take, in their order, so that their sizes add up to `k` exactly.

    Groups of places below their floor come first. A group is passed over only where no set of those not yet passed over
    could make up the rest, floors included.

    Args:
        sizes: of the groups, the best first.
        k: entries to take.
        places: for each group the position of its floor in `floors`, or the number of floors where it has none.
        floors: how many entries are taken in each place at least.

    Raises:
        MaskError: no set of groups will do.
    """
    places = [len(floors)] * len(sizes) if places is None else places
    counts = [Counter[int]() for _ in range(len(floors) + 1)]
    for size, place in zip(sizes, places, strict=True):
        counts[place][size] += 1
    least = [*floors, 0]
    _check_places(k, [Place(count, number) for count, number in zip(counts, least, strict=True)])
    of_one_size = [len(count) == 1 for count in counts]
    left, taken, behind = k, [], []
    for position, (size, place) in enumerate(zip(sizes, places, strict=True)):
        if least[place] <= 0:
            behind.append(position)
            continue
        counts[place][size] -= 1
        least[place] -= size
        # Where all have one size, whatever makes up the rest has groups of this place that can be changed for this one.
        if of_one_size[place] or can_be(left - size, [Place(*both) for both in zip(counts, least, strict=True)]):
            taken.append(position)
            left -= size
        else:
            least[place] += size
    rest = Counter(sizes[position] for position in behind)
    for position in behind:
        if not left:
            break
        size = sizes[position]
        rest[size] -= 1
        if size <= left and can_be(left - size, [Place(rest, 0)]):
            taken.append(position)
            left -= size
    return sorted(taken)


def _check_places(k: int, places: Sequence[Place]) -> None:
    if can_be(k, places):
        return
    counts: Counter[int] = sum((Counter(place.counts) for place in places), Counter())
    total = sum(size * number for size, number in counts.items())
    kinds = ", ".join(f"{number:,} of {size:,}" for size, number in sorted(counts.items()))
    floors = " and meets the floors" if any(place.least > 0 for place in places) else ""
    near = " and ".join(f"{number:,}" for number in nearest(k, places))
    raise MaskError(
        f"No set of whole groups ({kinds} entries) has {k:,} of the pool's {total:,} entries{floors}; the nearest are "
        f"{near}, beside what trains outside the pool. Ask for one of these, or for granularity='entry'."
    )
