"""What scoring adds up: the sums of per-example gradients and of their squares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fish_tuning.devices import has_float64, moved
from fish_tuning.errors import FisherError
from fish_tuning.scores.example_gradients import CHUNK_ENTRIES
from fish_tuning.scores.rounding import Rounding

Scores = dict[str, Tensor]


@dataclass
class Totals:
    """Sums over examples by tensor: of squared gradients, and, where they are asked for, of gradients.

    While it `ignores` what is added, another process adds the same.
    """

    squares: Scores
    gradients: Scores | None = None
    ignores: bool = False
    rounding: Rounding = field(default_factory=Rounding)

    @classmethod
    def zeros(
        cls,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device | str | None,
        gradients: bool,
    ) -> Totals:
        """`device`: None for that of each tensor. FisherError for float64 where a device has none."""
        places = {tensor.device for tensor in tensors.values()} if device is None else {torch.device(device)}
        without = [place for place in places if dtype == torch.float64 and not has_float64(place)]
        if without:
            raise FisherError(
                f"scores_dtype=torch.float64: {without[0]} has no numbers of 64 bits. Keep the scores on the CPU "
                "(scores_device='cpu'), or in torch.float32."
            )

        def zeros() -> Scores:
            return {
                name: torch.zeros_like(tensor, dtype=dtype, device=device, requires_grad=False)
                for name, tensor in tensors.items()
            }

        return cls(zeros(), zeros() if gradients else None)

    def add(self, name: str, squares: Tensor, gradients: Callable[[], Tensor]) -> None:
        """Both are dense or sparse by rows; `gradients` is called only where it is wanted."""
        if self.ignores:
            return
        self._add("squares", name, squares)
        if self.gradients is not None:
            self._add("gradients", name, gradients())

    def add_all(self, names: list[str], squares: list[Tensor], gradients: list[Tensor]) -> None:
        """The same of several tensors, dense and of one dtype and device; `gradients` where they are kept."""
        if self.ignores:
            return
        kept: list[tuple[Literal["squares", "gradients"], list[Tensor]]] = [("squares", squares)]
        if self.gradients is not None:
            kept.append(("gradients", gradients))
        for what, parts in kept:
            totals = [getattr(self, what)[name] for name in names]
            if all(total.dtype == torch.float32 and total.device == parts[0].device for total in totals):
                torch._foreach_add_(totals, parts)
                continue
            for name, part in zip(names, parts, strict=True):
                self._add(what, name, part)

    def add_plain(self, name: str, gradient: Tensor) -> None:
        """One example's. Nothing is written into it: autograd may have given others the same memory, or need it yet."""
        if self.ignores:
            return
        if self.gradients is not None:
            self._add("gradients", name, gradient)
        total = self.squares[name]
        if not gradient.is_sparse and gradient.dtype == total.dtype and gradient.device == total.device:
            total.addcmul_(gradient, gradient)
        else:
            self._add("squares", name, gradient.square())

    def add_together(self, gradients: Mapping[str, Tensor]) -> None:
        """Plain gradients of several tensors: the same as one by one, in fewer operations."""
        if self.ignores:
            return
        alike = []
        for name, gradient in gradients.items():
            total = self.squares[name]
            at_once = not gradient.is_sparse and gradient.is_contiguous()
            if at_once and gradient.dtype == total.dtype and gradient.device == total.device:
                alike.append(name)
            else:
                self.add_plain(name, gradient)
        if not alike:
            return
        parts = [gradients[name] for name in alike]
        if self.gradients is not None:
            torch._foreach_add_([self.gradients[name] for name in alike], parts)
        torch._foreach_addcmul_([self.squares[name] for name in alike], parts, parts)

    def _add(self, what: Literal["squares", "gradients"], name: str, part: Tensor) -> None:
        """To the total of that name, wherever and in whatever dtype it is kept."""
        total: Tensor = getattr(self, what)[name]
        if part.dtype == total.dtype == torch.float32 and part.device == total.device and not part.is_sparse:
            total.add_(part)
            return
        short = total.dtype == torch.bfloat16
        add = partial(self.rounding.add, f"{what} {name}") if short else Tensor.add_
        exactly = short and part.device == total.device  # else it is sent in 16 bits

        def here(values: Tensor) -> Tensor:
            return values if exactly else moved(values, total.device, total.dtype)

        if not part.is_sparse:
            add(total, here(part))
            return
        rows = part.indices()[0].to(total.device)  # each once
        read = total[rows]
        add(read, here(part.values()))
        total[rows] = read

    def means(self, examples: int) -> tuple[Scores, Scores]:
        """Of the gradients (empty where there are none) and of their squares, in the place of the sums."""
        gradients = self.gradients or {}
        for total in (*gradients.values(), *self.squares.values()):
            total.div_(examples)
        return gradients, self.squares

    def copy(self, names: Iterable[str]) -> Totals:
        """Of some tensors, to go back to."""
        kept = list(names)
        squares = {name: self.squares[name].clone() for name in kept}
        return Totals(squares, self.gradients and {name: self.gradients[name].clone() for name in kept})

    def set_back(self, name: str, earlier: Totals | None) -> None:
        """To an earlier copy, or to nothing."""
        for now, then in ((self.squares, earlier and earlier.squares), (self.gradients, earlier and earlier.gradients)):
            if now is not None:
                now[name].copy_(then[name]) if then else now[name].zero_()


class Together:
    """Plain gradients that wait to be added in one go, as small tensors are in a fraction of the time."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals
        self._waiting: Scores = {}
        self._entries = 0

    def take(self, name: str, gradient: Tensor) -> None:
        """One example's."""
        if name in self._waiting:  # another loss of the example
            self.flush()
        self._waiting[name] = gradient
        self._entries += gradient.numel()
        if self._entries > CHUNK_ENTRIES:
            self.flush()

    def flush(self) -> None:
        """Add what waits."""
        waiting, self._waiting, self._entries = self._waiting, {}, 0
        self._totals.add_together(waiting)
