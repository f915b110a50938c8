"""Adds up squared per-example gradients: by layer rules that are proven on the model, else by the loop."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fish_tuning.errors import FisherError
from fish_tuning.scores.batches import Batch, batch_size, most_padded_row, rows
from fish_tuning.scores.loss_vectors import LossVectors
from fish_tuning.scores.probes import Checksums, Probes, Scores, add_squares, checksum

logger = logging.getLogger("fish_tuning.scores.fisher")

# A layer rule is trusted for a tensor when it agrees with the plain gradient of one example this well. Wrong rules are
# wrong by the order of the gradient itself; rounding is far below, except where a gradient is all rounding.
RULE_TOLERANCE = 1e-3
LOW_PRECISION_TOLERANCE = 0.1
NEGLIGIBLE_GRADIENT = 1e-4  # of the norm over all tensors
CHECKED_BATCHES = 4  # in which a tensor may wait for an example that gives it a gradient
_NO_GRADIENT = torch.zeros(2, dtype=torch.float64)


class Scorer:
    """Adds batches up into `scores`, tensor by tensor by rule or by loop."""

    def __init__(
        self,
        model: nn.Module,
        trainable: dict[str, nn.Parameter],
        losses: LossVectors,
        method: str,
        scores: Scores,
    ) -> None:
        self.trainable, self.losses, self.scores = trainable, losses, scores
        self.probes = Probes(model, trainable if method == "auto" else ())
        self.reasons = dict.fromkeys(
            trainable.keys() - set(self.probes.names), "no rule" if method == "auto" else "method='loop'"
        )
        # How far each rule is proven: 1 with single examples, 2 with several, where a layer that does not keep examples
        # apart shows. An example that gives a tensor no gradient proves nothing, so others are tried.
        self.proven = dict.fromkeys(self.probes.names, 0)
        self.checks = Counter[int]()
        self.begun = False
        self.slots = _slots(model, trainable)
        self.reach_checked: set[str] = set()
        self.gradient_scale = 0.0  # squared norm of an example's gradient, the largest seen

    def add(self, batch: Batch, first_example: int) -> None:
        level = min(batch_size(batch), 2)
        unproven = [name for name in self.probes.names if self.proven[name] < level]
        if unproven and self.checks[level] < CHECKED_BATCHES:
            self.checks[level] += 1
            self._add_checked(batch, first_example, unproven, level)
        elif self.probes.names:
            self._batched(batch, first_example, self.scores)
        if self.probes.broken:
            name, reason = next(iter(self.probes.broken.items()))
            raise FisherError(
                f"The layer of {name!r} is called differently from batch to batch: {reason}. Use method='loop'."
            )
        if not self.begun:
            self._log_choice()
        looped = [name for name in self.trainable if name in self.reasons]
        if looped:
            self._loop(batch, first_example, looped, self.scores)
        self.begun = True

    def _add_checked(self, batch: Batch, first_example: int, names: list[str], level: int) -> None:
        """Adds the batch by rule, but keeps of `names` only those whose rule agrees with the loop on one example."""
        row = most_padded_row(batch)  # if anything spills between examples, it shows there
        before = {name: self.scores[name].clone() if self.begun else None for name in names}
        by_rule: Checksums = {}
        self._batched(batch, first_example, self.scores, by_rule, row)
        by_loop = dict.fromkeys(names, _NO_GRADIENT)

        def take(name: str, squares: Tensor) -> None:
            by_loop[name] = by_loop[name] + checksum(squares)

        self._square_gradients(rows(batch, row, row + 1), first_example + row, names, take)
        wrong = self._disagreements(by_rule, by_loop, level)
        wrong |= {name: self.probes.broken.pop(name) for name in names if name in self.probes.broken}
        for name in wrong:
            earlier = before[name]
            self.scores[name].zero_() if earlier is None else self.scores[name].copy_(earlier)
        self.probes.release(wrong)
        self.reasons |= wrong
        if wrong and self.begun:
            self._log_choice()

    def _disagreements(self, by_rule: Checksums, by_loop: Checksums, level: int) -> dict[str, str]:
        """Tensors whose rule does not give what the loop gives on one example; those that do are proven."""
        rule = torch.stack([by_rule.get(name, _NO_GRADIENT) for name in by_loop])
        loop = torch.stack(list(by_loop.values()))
        self.gradient_scale = max(self.gradient_scale, float(loop[:, 0].sum()))
        floor = NEGLIGIBLE_GRADIENT**2 * self.gradient_scale
        agrees = ((rule - loop).abs() <= 2 * self._tolerance() * loop[:, :1].clamp(min=floor)).all(dim=1).tolist()
        tells = (loop[:, 0] > floor).tolist()
        self.proven |= {name: level for name, ok, tell in zip(by_loop, agrees, tells, strict=True) if ok and tell}
        return {
            name: "its rule does not agree with the plain gradient"
            for name, ok in zip(by_loop, agrees, strict=True)
            if not ok
        }

    def _tolerance(self) -> float:
        low = torch.is_autocast_enabled(self._device().type) or any(
            parameter.dtype not in (torch.float32, torch.float64) for parameter in self.losses.model.parameters()
        )
        return LOW_PRECISION_TOLERANCE if low else RULE_TOLERANCE

    def _batched(
        self, batch: Batch, first_example: int, into: Scores, checksums: Checksums | None = None, row: int = 0
    ) -> None:
        losses = self._forward(batch, first_example)
        self.probes.backward(losses, into, checksums, row)

    def _forward(self, batch: Batch, first_example: int) -> list[Tensor]:
        self.probes.start(batch_size(batch), self._device())
        try:
            return self.losses(batch, first_example)
        except RuntimeError:
            if not self.probes.expanded:
                raise
        # A model that repeats its one row for every example by itself: leave the row as it is; the loop takes it.
        self.probes.expanded[0].expand = False
        return self._forward(batch, first_example)

    def _loop(self, batch: Batch, first_example: int, names: list[str], into: Scores) -> None:
        """The definition: one example at a time, without its padding, its gradient squared."""

        def take(name: str, squares: Tensor) -> None:
            add_squares(into[name], squares)

        for row in range(batch_size(batch)):
            self._square_gradients(rows(batch, row, row + 1), first_example + row, names, take)

    def _square_gradients(
        self, example: Batch, number: int, names: list[str], take: Callable[[str, Tensor], None]
    ) -> None:
        """`take(name, squares)` for each tensor that the example's loss depends on, once a loss vector.

        Stand-ins for the parameters receive the gradients, one at a time: a whole model's never lie side by side, and
        what hangs on the parameters themselves (`.grad`, hooks) stays out of it.
        """

        def receive(name: str, stand_in: Tensor) -> None:
            gradient, stand_in.grad = stand_in.grad, None
            if gradient is not None:
                gradient = gradient.float()
                take(name, gradient.square_() if gradient.is_contiguous() else gradient.square())

        stand_ins = {name: self.trainable[name].detach().requires_grad_() for name in names}
        for name, stand_in in stand_ins.items():
            stand_in.register_post_accumulate_grad_hook(partial(receive, name))
        in_place = {slot: stand_in for name, stand_in in stand_ins.items() for slot in self.slots[name]}
        losses = self.losses(self.losses.trimmed(example), number, in_place)
        self._check_reach(losses[0], {name: self.trainable[name] for name in names})
        for vector, loss in enumerate(losses, start=1):
            torch.autograd.backward(loss.sum(), inputs=list(stand_ins.values()), retain_graph=vector < len(losses))

    def _check_reach(self, loss: Tensor, own: dict[str, nn.Parameter]) -> None:
        """Refuse a tensor that its module gets at by another way than its attribute: no stand-in can take its place."""
        if self.reach_checked.issuperset(own):
            return
        self.reach_checked |= own.keys()
        gradients = torch.autograd.grad(loss.sum(), list(own.values()), allow_unused=True, retain_graph=True)
        for name, gradient in zip(own, gradients, strict=True):
            if gradient is not None:
                raise FisherError(
                    f"{name!r} cannot be scored: its layer keeps a reference to it of its own, past the module's "
                    "attribute. Set requires_grad_(False) on it, or use another PEFT method."
                )

    def _device(self) -> torch.device:
        return next(iter(self.trainable.values())).device

    def _log_choice(self) -> None:
        logger.info("Fisher information: %d tensors by batched rules.", len(self.probes.names))
        for reason, number in Counter(self.reasons.values()).items():
            example = next(name for name, why in self.reasons.items() if why == reason)
            logger.info("Fisher information: %d tensors by the loop (%s), e.g. %s.", number, reason, example)


def _slots(model: nn.Module, trainable: dict[str, nn.Parameter]) -> dict[str, list[str]]:
    """Every place of each tensor, a tied one's several; a module that is registered twice counts once."""
    names = {id(parameter): name for name, parameter in trainable.items()}
    slots: dict[str, list[str]] = {name: [] for name in trainable}
    for prefix, module in model.named_modules():
        for local, parameter in module._parameters.items():
            if id(parameter) in names:
                slots[names[id(parameter)]].append(f"{prefix}.{local}" if prefix else local)
    return slots
