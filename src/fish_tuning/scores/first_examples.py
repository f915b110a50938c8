"""The first examples of a loader, which warm-up takes: those of one process, in its order, on every process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fish_tuning.scores.batches import Batch, batch_size, kept
from fish_tuning.scores.loader_parts import Order
from fish_tuning.scores.lockstep import Share


def first_batches(batches: Iterator[Batch], examples: int) -> list[Batch]:
    """The first batches, until they hold so many examples."""
    taken: list[Batch] = []
    seen = 0
    while seen < examples:
        taken[-1:] = map(kept, taken[-1:])
        if (batch := next(batches, None)) is None:
            break
        taken.append(batch)
        seen += batch_size(batch)
    return taken


def first_rounds(left: Iterator[list[Share]], examples: int) -> list[list[Share]]:
    """The first rounds, until they hold so many examples of all processes."""
    taken: list[list[Share]] = []
    seen = 0
    while seen < examples:
        taken[-1:] = [[share._replace(batch=kept(share.batch)) for share in shares] for shares in taken[-1:]]
        if (shares := next(left, None)) is None:
            break
        taken.append(shares)
        seen += sum(batch_size(share.batch) for share in shares)
    return taken


def places(shares: Sequence[Share], order: Order) -> list[Sequence[int]]:
    """For each share the places of its rows, where one process would have had them; shares come round by round.

    `order`: how the processes' parts make up the whole.
    """
    rows: list[tuple[tuple[int, ...], int]] = []  # what to sort by, and whose row it is
    seen: dict[int, int] = {}
    for number, share in enumerate(shares):
        before = seen.get(share.owner, 0)
        seen[share.owner] = before + batch_size(share.batch)
        for row in range(before, seen[share.owner]):
            key = {"rows": (row, share.owner), "batches": (number, row), "parts": (share.owner, row)}[order]
            rows.append((key, number))
    found: list[list[int]] = [[] for _ in shares]
    for place, (_, number) in enumerate(sorted(rows)):
        found[number].append(place)
    return list(found)
