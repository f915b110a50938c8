"""Rules that were proven are looked at again now and then, since later batches may hold what earlier ones did not.

A proof is one example's: what spares it (rows that only some batches sort, branches that only some data take) passes.
"""

from __future__ import annotations

from fish_tuning.errors import FisherError
from fish_tuning.scores.batches import Batch, batch_size, kept

_FIRST = 64  # examples; then after twice as many as at the last look: less than two examples more in a hundred
_KEPT_BYTES = 2**26


class LaterLooks:
    """When to look next, and the batches that were added until then: where a rule fails, they are added anew."""

    def __init__(self, on: bool = True) -> None:
        self.on = on  # else what is proven stays so
        self._next, self._seen = _FIRST, 0
        self._kept: list[tuple[Batch, int]] | None = []
        self._bytes = 0

    def are_due(self) -> bool:
        return self.on and self._seen >= self._next

    @property
    def keeps_all(self) -> bool:
        """Whether all batches so far are kept."""
        return self._kept is not None

    def note(self, batch: Batch, first_example: int, by_rule: bool = True, looked: bool = False) -> None:
        """A batch was added; a copy of it is kept."""
        if not self.on:
            return
        self._seen += batch_size(batch) if by_rule else 0
        if looked:
            self._next = 2 * self._seen
        self._bytes += sum(value.nbytes for value in batch.values())
        if self._kept is not None and self._bytes <= _KEPT_BYTES:
            self._kept.append((kept(batch), first_example))
        else:
            self._kept = None

    def earlier(self, failed: str) -> list[tuple[Batch, int]]:
        """What to add anew for tensors whose rule failed.

        Raises FisherError where that is no longer there.
        """
        if self._kept is None:
            raise FisherError(
                f"Of {failed!r} what is computed in batches agreed with single examples at first, but does not after "
                f"{self._seen} examples: what other examples hold or how long they are decides how the model computes "
                "them. Score with method='loop', which takes one example at a time."
            )
        return self._kept
