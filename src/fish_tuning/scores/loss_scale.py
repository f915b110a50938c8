"""Losses scaled for fp16, where gradients below 6e-8 are zero and those above 65,504 infinite: no squares are lost."""

from __future__ import annotations

from torch import Tensor

FIRST, STEP = 2.0**12, 2.0**4  # powers of two: what is scaled by them comes back to the bit


class Overflow(Exception):
    """A scaled gradient is not finite; a smaller scale may do."""


class LossScale:
    """The factor of all losses; 1 where nothing is computed in fp16."""

    def __init__(self, fp16: bool) -> None:
        self.value = FIRST if fp16 else 1.0
        self._finite: Tensor | None = None

    def unscaled(self, gradient: Tensor) -> Tensor:
        """The fp32 gradient of the loss itself; notes whether it is finite."""
        if self.value == 1:
            return gradient
        finite = gradient.isfinite().all()
        self._finite = finite if self._finite is None else self._finite & finite.to(self._finite.device)
        return gradient / self.value

    def check(self) -> None:
        """Overflow if any gradient since the last check was not finite."""
        finite, self._finite = self._finite, None
        if finite is not None and not bool(finite):
            raise Overflow

    def lower(self) -> None:
        """At 1, what is not finite counts as it is."""
        self.value = max(1.0, self.value / STEP)
