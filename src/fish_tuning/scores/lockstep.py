"""Scoring a sharded model in several processes: they share out the examples and do the same passes at the same time.

FSDP gathers a layer's tensors when all processes reach it, so none may do a pass that the others do not. As long as
rules are to be proven, each decides by what it sees, so all look at the same batch, whose owner alone adds it up.
After that every process has a batch of its own; one without does another's, which it does not add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from fish_tuning.scores.batches import Batch, batch_size, kept, one_by_one_is_as_fast, padded_rows
from fish_tuning.scores.loss_vectors import UNREAD, LossVectors
from fish_tuning.scores.processes import Processes
from fish_tuning.scores.scorer import Scorer


class Share(NamedTuple):
    """A batch that one process adds up; `first_example` numbers its first row."""

    batch: Batch
    first_example: int
    owner: int


def rounds(processes: Processes, batches: Iterator[Batch]) -> Iterator[list[Share]]:
    """At most one batch for each process, all of them on every process."""
    number = processes.number
    seen = [0] * number  # of each process's part, or of the loader that all have
    while True:
        own: list[Batch] = []
        error = None
        try:
            while len(own) < (1 if processes.has_own_part else number):
                own[-1:] = map(kept, own[-1:])
                if (batch := next(batches, None)) is None:
                    break
                own.append(batch)
        except Exception as raised:
            error = raised
        processes.agree(error)
        shares = []
        for owner, batch in processes.everyones(own):
            place = owner if processes.has_own_part else 0
            shares.append(Share(batch, processes.first_example(seen[place], place), owner))
            seen[place] += batch_size(batch)
        if not shares:
            return
        yield shares


class Lockstep:
    """Adds rounds up with a scorer; all processes must call `add` with the same shares."""

    def __init__(self, scorer: Scorer, losses: LossVectors, processes: Processes) -> None:
        self.scorer, self.losses, self.processes = scorer, losses, processes
        scorer.later.on = False  # what one process adds anew, the others would have to wait for

    def add(self, shares: list[Share]) -> None:
        shares = [share._replace(batch=self.losses.trimmed(share.batch)) for share in shares]
        scorer = self.scorer
        for share in shares:
            scorer.probes.rows_by_data(share.batch)  # what is refused is so by all, not by one that others wait for
        alone = [one_by_one_is_as_fast(share.batch) for share in shares]
        settled = all(_is_settled(scorer, share.batch) for share in shares)
        if scorer.scale.value > 1 or any(alone) != all(alone) or not (all(alone) or settled):
            for share in shares:
                scorer.totals.ignores = share.owner != self.processes.rank
                scorer.add(share.batch, share.first_example)
        else:
            scorer.after_forward = self._meet
            try:
                if all(alone):
                    self._loop(shares, dict.fromkeys(scorer.trainable, frozenset(range(len(shares)))))
                else:
                    self._by_rules(shares)
            finally:
                scorer.after_forward = _nothing
        scorer.totals.ignores = False
        error = None
        try:
            self.losses.check_finite(unread=UNREAD)
        except Exception as raised:
            error = raised
        self.processes.agree(error)

    def _by_rules(self, shares: list[Share]) -> None:
        scorer = self.scorer
        looped = {name: frozenset(range(len(shares))) for name in scorer.looped}
        broken: list[Mapping[str, str]] = [{}] * len(shares)
        if scorer.probes.names:
            place = self._place(shares)
            mine = shares[place or 0]
            scorer.totals.ignores = place is None
            own = scorer.by_rules(mine.batch, mine.first_example)
            told = self.processes.told(own if place is not None else {})
            broken = [told[share.owner] for share in shares]
        failed = {name: reason for each in broken for name, reason in each.items()}
        if failed:
            scorer.without(failed)
        of_shares = {
            name: looped.get(name, frozenset(number for number, each in enumerate(broken) if name in each))
            for name in scorer.trainable
        }
        self._loop(shares, {name: numbers for name, numbers in of_shares.items() if numbers})

    def _loop(self, shares: list[Share], names: Mapping[str, frozenset[int]]) -> None:
        """The tensors of `names`, each of those of the shares that it names, by number.

        All processes take the gradients of all of these tensors: for fewer, a backward pass may end sooner.
        """
        scorer, place = self.scorer, self._place(shares)
        mine = shares[place or 0]
        size = batch_size(mine.batch)
        for row in range(max(batch_size(share.batch) for share in shares) if names else 0):
            scorer.totals.ignores = place is None or row >= size

            def take(name: str, gradient: Tensor) -> None:
                if place in names[name]:
                    scorer.totals.add_plain(name, gradient)

            scorer.take_gradients(mine.batch, mine.first_example, min(row, size - 1), list(names), take)
        scorer.begun = True

    def _place(self, shares: list[Share]) -> int | None:
        """The number of this process's share."""
        return next((n for n, share in enumerate(shares) if share.owner == self.processes.rank), None)

    def _meet(self, error: Exception | None) -> None:
        """Between forward and backward pass, where all processes are."""
        if error is not None and self.losses.in_forward:
            self.processes.leave()  # others wait within the pass, and end as this process does
        else:
            self.processes.agree(error)


def _is_settled(scorer: Scorer, batch: Batch) -> bool:
    """Whether nothing is left to prove, nor anything to log."""
    met = scorer.padding_met.issuperset(padded_rows(batch))
    return scorer.told and met and scorer.proven.issuperset(scorer.probes.names)


def _nothing(error: Exception | None) -> None:
    """What to do between the passes of a process that goes its own way."""
