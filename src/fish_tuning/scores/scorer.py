"""Adds up per-example gradients and their squares: by layer rules that are proven on the model, else by the loop."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from fish_tuning.errors import FisherError
from fish_tuning.model_walks import every_parameter
from fish_tuning.scores.batches import Batch, batch_size, one_by_one_is_as_fast, padded_rows, rows, rows_to_look_at
from fish_tuning.scores.checks import (
    Check,
    Checksumming,
    Checksums,
    Comparison,
    Floor,
    distance,
    on_cpu,
    random_weights,
    room_alone,
    tolerance,
)
from fish_tuning.scores.expansion import with_expansion_if_possible
from fish_tuning.scores.failures import DISAGREES, PADDING, log_choice, told_of
from fish_tuning.scores.later_looks import LaterLooks
from fish_tuning.scores.loss_scale import LossScale, Overflow
from fish_tuning.scores.loss_vectors import AS_IT_IS, LossVectors
from fish_tuning.scores.plain_gradients import PlainGradients, Take
from fish_tuning.scores.precision import full_precision
from fish_tuning.scores.probes import Probes
from fish_tuning.scores.reading import placed
from fish_tuning.scores.row_order import tracked
from fish_tuning.scores.sharded_models import gathered_layer_by_layer
from fish_tuning.scores.totals import Together, Totals
from fish_tuning.scores.watched_layers import BY_DATA

logger = logging.getLogger("fish_tuning.scores.fisher")


class _PaddingMatters(Exception):
    """An example has another gradient by itself, without its padding and without the others of its batch."""


class Scorer:
    """Adds batches up into `totals`, tensor by tensor by rule or by loop.

    `looped` maps the tensors that go through the loop to the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: dict[str, nn.Parameter],
        losses: LossVectors,
        method: str,
        totals: Totals,
    ) -> None:
        self.trainable, self.losses, self.totals = trainable, losses, totals
        self.checksums = Checksumming(signed=totals.gradients is not None)  # squares prove no sign, and need none
        self.probes = Probes(model, trainable if method == "auto" else ())
        self.plain = PlainGradients(model, trainable)
        self._without_rule = "no rule" if method == "auto" else "method='loop'"
        self.failed: dict[str, str] = {}
        self.proven: set[str] = set()
        self.looked_at: set[str] = set()  # those of which an example was looked at alone
        self._weights = weights = {parameter.dtype for parameter in every_parameter(losses.model)}
        self.scale = LossScale(fp16=torch.float16 in {*losses.autocast.dtypes.values(), *weights})
        self.probes.state.scale = self.plain.scale = self.scale
        self.padding_met: set[tuple[bool, ...]] = set()  # the ways of padding that rows had by which rules are proven
        self.later = LaterLooks(on=method == "auto")
        self.anew: set[str] = set()  # the tensors that earlier batches are to be added for once more
        self.begun = False  # whether the totals hold anything
        self.told = False  # whether the log says how tensors are scored
        self.floor = Floor(short=self._low_precision())
        self.after_forward: Callable[[Exception | None], None] = lambda error: None  # its error, if there was one

    @cached_property
    def looped(self) -> dict[str, str]:
        return dict.fromkeys(self.trainable.keys() - set(self.probes.names), self._without_rule)

    def add(self, batch: Batch, first_example: int) -> None:
        """In fp16, where small gradients vanish and large ones overflow, at a scale at which none overflows."""
        while True:
            before = self.totals.copy(self.trainable) if self.scale.value > 1 else None
            proofs = set(self.proven), set(self.looked_at), set(self.padding_met)
            try:
                self._add(batch, first_example)
                return
            except Overflow:
                for name in self.trainable:
                    self.totals.set_back(name, before)
                self.proven, self.looked_at, self.padding_met = proofs
                self.scale.lower()

    def _add(self, batch: Batch, first_example: int) -> None:
        self.probes.rows_by_data(batch)  # which refuses what nothing splits into examples
        if one_by_one_is_as_fast(batch):
            # What needs no rule needs no proof of one, which would cost as much as another example.
            self.loop(batch, first_example, list(self.trainable))
            self.later.note(batch, first_example, by_rule=False)
            self.begun = True
            return
        self._add_anew()
        again = self._to_prove_again()
        padded = {way: found for way, found in padded_rows(batch).items() if way not in self.padding_met}
        if padded:
            # Rules that rows without padding, or with some elsewhere, have proven do not hold where examples reach it.
            self.padding_met |= padded.keys()
            self.proven, self.looked_at = set(), set()
        drawn = self._drawn(batch, first_example, shortest=False) if again else []
        look = list(dict.fromkeys([*(row for found in padded.values() for row in found), *drawn]))
        unproven = [name for name in self.probes.names if name not in self.proven]
        failed: dict[str, str] = {}
        if unproven:
            kept = again if self.later.keeps_all else set()
            before = self.totals.copy(set(unproven) - kept) if self.begun else None
            try:
                with full_precision():
                    failed = self._add_checked(batch, first_example, unproven, look)
                undone = failed.keys() & set(unproven)
                wrong = {name for name in undone if failed[name] == DISAGREES}
            except _PaddingMatters:
                self._give_up(PADDING)
                undone = wrong = set(unproven)
            self.anew |= undone & (kept or wrong) & again
            for name in undone - self.anew:
                self.totals.set_back(name, before)
            self._add_anew()
        elif self.probes.names:
            self.probes.backward(self._forward(batch, first_example), self.totals)
            self.scale.check()
            failed = dict(self.probes.broken)
        moved = self.without(failed)
        self.loop(batch, first_example, [name for name in self.trainable if name in self.looped or name in moved])
        self.later.note(batch, first_example, looked=bool(again))
        self.begun = True

    def _to_prove_again(self) -> set[str]:
        """The tensors whose rules are to be proven once more: none most of the time."""
        if not self.later.are_due():
            return set()
        again, self.proven, self.looked_at = self.proven, set(), set()
        return again

    def _add_anew(self) -> None:
        """Adds earlier batches by the loop for tensors whose rules do not hold any more."""
        for name in self.anew:
            self.totals.set_back(name, None)
        for batch, first_example in self.later.earlier(min(self.anew)) if self.anew else ():
            self.loop(batch, first_example, list(self.anew))
        self.anew = set()

    def without(self, failed: dict[str, str]) -> set[str]:
        """Watch these tensors no longer where they were; returns those that a module further out is done again for."""
        looped, users_own = self.looped, self.probes.by_rules_of_users(failed)
        moved = self.probes.release(failed)
        for name in moved:
            self.looked_at.discard(name)
            self.proven.discard(name)
            logger.info("Fisher information: %s: %s; a module is done again for it.", name, failed[name])
        given_up = {name: reason for name, reason in failed.items() if name not in moved}
        self.failed |= given_up
        self.failed |= {name: f"{failed[name]}, which was registered in code of yours" for name in users_own}
        looped |= given_up
        if failed or not self.told:
            log_choice(self.probes, looped)
            self.told = True
        return moved

    def _give_up(self, reason: str) -> None:
        """Loop everything."""
        self.failed |= dict.fromkeys(self.probes.names, reason)
        self.looped |= self.failed
        self.probes.release(self.probes.names, further_out=False)

    def new_failures(self) -> list[str]:
        """What to tell the user of rules that failed since the last call."""
        failed, self.failed = self.failed, {}
        return told_of(failed, len(self.trainable))

    def _add_checked(self, batch: Batch, first_example: int, names: list[str], look: list[int]) -> dict[str, str]:
        """Adds the batch by rule, also for those of `names` whose rule failed; returns them with the reason.

        One example is looked at alone, or those of the rows `look`. Where they have no gradient, they prove
        nothing; then the gradient of the batch must be what the rule says, now and in every batch to come. Where that
        is not zero, it is looked whether examples are kept apart: in 32 bits each is looked at alone, in 16 the batch
        is done again with other weights.
        """
        size, padded = batch_size(batch), look
        look = padded or self._drawn(batch, first_example)
        new = [name for name in names if name not in self.looked_at]
        first = not self.looked_at
        self.looked_at |= set(new)
        alone: Checksums = {}
        in_row = Comparison(set(), set(), set())
        failed: dict[str, str] = {}
        if not self._low_precision():
            alone = self._of_examples(batch, first_example, look, new)
            floor = len(look) * self.floor.of(alone, len(look))
            waiting = [name for name in names if name not in alone or float(alone[name][0]) <= floor]
        else:
            for row in look if new else ():
                in_pair = self._of_a_pair(batch, first_example, row, new, padding=first)
                in_row = in_pair if row == look[0] else in_row.beside(in_pair)
                failed |= self.probes.broken
            known = in_row.right | in_row.disagree | failed.keys()
            waiting = [name for name in names if name not in known]
            new = []

        weights = random_weights(size, seed=first_example) if waiting else torch.ones(size)
        check = self._check(new, waiting, look, weights)
        together: Checksums = {}
        stand_ins = self.plain.stand_ins(waiting, partial(self.checksums.add_gradient, together))
        with self.probes.shapes_seen() if new else AS_IT_IS:
            losses = self._forward(batch, first_example, self.plain.in_place(stand_ins))
        self.losses.check_finite()
        self.probes.backward(losses, self.totals, check, stand_ins.values())
        self.scale.check()
        failed |= self.probes.broken
        together = on_cpu(together)
        if new:
            in_row = self._compare(new, check.of_row, alone, floor, failed)
        for row in padded if in_row.disagree and not self._low_precision() else ():
            self._check_padding(rows(batch, row, row + 1), first_example + row, 0, names)
        floor = size * self.floor.of(together, size)
        in_sum = self._compare(waiting, check.of_sum, together, floor, failed)
        told = [name for name in waiting if name in in_sum.right - in_row.right]
        if not self._low_precision():  # then rounding that a rule repeats is no reason to look at every example
            told = [name for name in told if float(together[name][0]) > floor]
        again = self._again(batch, first_example, told) if told else {}
        in_batch = self._compare(told, check.of_batch, again, floor, failed)

        if self.probes.untold():
            failed |= dict.fromkeys(self._by_data(batch, first_example), BY_DATA)
        self.proven |= (in_row.right | in_batch.agree) - failed.keys()
        disagree = in_row.disagree | in_sum.disagree | in_batch.disagree
        failed |= {name: DISAGREES for name in names if name in disagree}
        return failed

    def _drawn(self, batch: Batch, first_example: int, shortest: bool = True) -> list[int]:
        number = 1 if self._low_precision() else max(1, batch_size(batch) // 32)  # in 16 bits each takes more
        return rows_to_look_at(batch, number, first_example, shortest)

    def _check(self, alone: Iterable[str], together: Iterable[str], looked_at: list[int], weights: Tensor) -> Check:
        return Check(frozenset(alone), frozenset(together), looked_at, placed(weights, self._device()), self.checksums)

    def _compare(
        self, names: Iterable[str], rule: Checksums, plain: Checksums, floor: float, failed: dict[str, str]
    ) -> Comparison:
        left = [name for name in names if name not in failed]
        return Comparison.of(left, on_cpu(rule), plain, tolerance(self._dtypes()), floor)

    def _of_a_pair(self, batch: Batch, first_example: int, row: int, names: list[str], padding: bool) -> Comparison:
        """The rules' gradients of the row, in 16 bits, with what it has alone; `probes.broken` tells what could not be.

        By itself it would tell little: another shape rounds otherwise, by more than a small gradient. So it is done
        together with a row beside it, once with the losses of both, by rule, and once with its own loss alone. That
        differs by nothing but sums' rounding, for the least gradient too.
        """
        start = max(row - 1, 0)
        pair, first_example, row = rows(batch, start, start + 2), first_example + start, row - start
        alone = self._of_loss(pair, first_example, row, names)
        if padding:
            self._check_padding(pair, first_example, row, names, alone)
        check = self._check(names, (), [row], torch.ones(batch_size(pair)))
        with self.probes.shapes_seen():
            losses = self._forward(pair, first_example)
        self.losses.check_finite()
        self.probes.backward(losses, replace(self.totals, ignores=True), check)
        self.scale.check()
        return self._compare(names, check.of_row, alone, self.floor.of(alone), self.probes.broken)

    def _again(self, batch: Batch, first_example: int, names: list[str]) -> Checksums:
        """What the batch's squares must be where examples are kept apart."""
        if not self._low_precision():
            return self._of_examples(batch, first_example, range(batch_size(batch)), names)
        # An example that others reach has another gradient where these have other weights.
        check = self._check((), names, [0], torch.ones(batch_size(batch)))
        self.probes.backward(self._forward(batch, first_example), replace(self.totals, ignores=True), check)
        self.scale.check()
        return on_cpu(check.of_batch)

    def _by_data(self, batch: Batch, first_example: int) -> list[str]:
        """The tensors whose rows data have put in their order, where a layer's input has no graph to tell it."""
        if not gathered_layer_by_layer(self.losses.model):
            with contextlib.suppress(RuntimeError), tracked(self.losses.model):  # it may write into what is frozen
                self._forward(batch, first_example)
            self.probes.leave()
        return self.probes.by_data()

    def _of_examples(self, batch: Batch, first_example: int, numbers: Iterable[int], names: list[str]) -> Checksums:
        """Of examples' plain gradients, each by itself and without its padding, added up; on the CPU."""
        sums: Checksums = {}
        for row in numbers if names else ():
            self.take_gradients(batch, first_example, row, names, partial(self.checksums.add_gradient, sums))
        self.losses.check_finite()
        return on_cpu(sums)

    def _of_loss(self, batch: Batch, first_example: int, row: int, names: list[str]) -> Checksums:
        """Of the plain gradients of one loss of a batch; on the CPU."""
        sums: Checksums = {}
        stand_ins = self.plain.stand_ins(names, partial(self.checksums.add_gradient, sums))
        losses = self._losses(batch, first_example, self.plain.in_place(stand_ins))
        self.plain.check_reach(losses[0], names)
        for number, loss in enumerate(losses, start=1):
            scaled = loss[row] * self.scale.value
            torch.autograd.backward(scaled, inputs=list(stand_ins.values()), retain_graph=number < len(losses))
        self.scale.check()
        self.losses.check_finite()
        return on_cpu(sums)

    def _check_padding(
        self, batch: Batch, first_example: int, row: int, names: list[str], in_batch: Checksums | None = None
    ) -> None:
        """_PaddingMatters where the row's gradient by itself, without padding, is another than that `in_batch`.

        In 16 bits rules cannot tell, and in 32 not of tensors whose gradient is nearly none. Losses would tell less:
        one that rounding could account for may come with quite another gradient. Where labels are drawn, both are those
        of the labels that are given, since rounding may draw another.
        """
        scored = self.losses
        try:
            if scored.fisher_type == "sampled":
                self.losses, in_batch = scored.of_given_labels(), None
            if in_batch is None:
                in_batch = self._of_loss(batch, first_example, row, names)
            alone: Checksums = {}
            self.take_gradients(batch, first_example, row, names, partial(self.checksums.add_gradient, alone))
            self.losses.check_finite()
        finally:
            self.losses = scored
        if not distance(on_cpu(alone), in_batch) <= room_alone(self._dtypes()):
            raise _PaddingMatters

    def _dtypes(self) -> set[torch.dtype]:
        """In which the model computes."""
        return {*self.losses.autocast.dtypes.values(), *self._weights}

    def _low_precision(self) -> bool:
        return not self._dtypes() <= {torch.float32, torch.float64}

    def _forward(
        self, batch: Batch, first_example: int, in_place: AbstractContextManager[None] = AS_IT_IS
    ) -> list[Tensor]:
        def attempt() -> list[Tensor]:
            self.probes.start(batch_size(batch), self._device(), batch)
            return self._losses(batch, first_example, in_place)

        return with_expansion_if_possible(attempt, self.probes)

    def _losses(
        self, batch: Batch, first_example: int, in_place: AbstractContextManager[None] = AS_IT_IS
    ) -> list[Tensor]:
        try:
            losses = self.losses(batch, first_example, in_place)
            if not all(loss.requires_grad for loss in losses):
                raise FisherError(
                    f"The loss depends on no trainable tensor (there are {len(self.trainable)}, e.g. "
                    f"{next(iter(self.trainable))!r}), so there is no gradient to square. Is the forward pass under "
                    "torch.no_grad(), or are the active adapter and the trainable one not the same?"
                )
        except Exception as error:
            self.after_forward(error)
            raise
        self.after_forward(None)
        return losses

    def loop(self, batch: Batch, first_example: int, names: list[str]) -> None:
        """The definition: one example at a time, without its padding, its gradient and that squared."""
        together = Together(self.totals)
        for row in range(batch_size(batch) if names else 0):
            self.take_gradients(batch, first_example, row, names, together.take)
            together.flush()

    def by_rules(self, batch: Batch, first_example: int) -> dict[str, str]:
        """Adds the batch by rules that are proven; returns the tensors that nothing was added for, with the reason."""
        self.probes.start(batch_size(batch), self._device(), batch)
        self.probes.backward(self._losses(batch, first_example), self.totals)
        return dict(self.probes.broken)

    def take_gradients(self, batch: Batch, first_example: int, row: int, names: list[str], take: Take) -> None:
        """`take(name, gradient)` for each tensor that the row's loss depends on, once a loss vector."""
        stand_ins = self.plain.stand_ins(names, take)
        example = self.losses.trimmed(rows(batch, row, row + 1))
        losses = self._losses(example, first_example + row, self.plain.in_place(stand_ins))
        self.plain.check_reach(losses[0], names)
        for vector, loss in enumerate(losses, start=1):
            scaled = loss.sum() * self.scale.value
            torch.autograd.backward(scaled, inputs=list(stand_ins.values()), retain_graph=vector < len(losses))
        self.scale.check()

    def _device(self) -> torch.device:
        return next(iter(self.trainable.values())).device
