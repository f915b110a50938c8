"""The statistic of paired differences, given by task: one t for the interval and for p, and Holm's correction of both.

Chosen by simulation over few seeds and unequal tasks; docs/statistics.md has the tables. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance
from typing import NamedTuple

REDUCTION = 0.85  # of Satterthwaite's degrees: keeps false findings at 5 % where tasks are uneven
TIE = 1e-12  # differences below this are rounding


class Estimate(NamedTuple):
    """The mean of the task means, its standard error, and the degrees of freedom of that."""

    mean: float
    error: float
    degrees: float

    @property
    def p(self) -> float:
        """Two-sided p of a true mean of zero."""
        from scipy.stats import t

        return float(2 * t.sf(abs(self.mean) / self.error, self.degrees))

    def interval(self, level: float) -> tuple[float, float]:
        """The values that a two-sided test at this level does not refuse: level 0.05 for a 95 % interval."""
        from scipy.stats import t

        half = float(t.isf(level / 2, self.degrees)) * self.error
        return self.mean - half, self.mean + half


def estimate(by_task: Sequence[Sequence[float]]) -> Estimate | None:
    """Of differences by task, every task with the same weight; None where nothing tells of their spread.

    With K tasks of n_k values and variance s_k^2, a_k = s_k^2 / n_k: the standard error is sqrt(sum a_k) / K, with
    0.85 of (sum a_k)^2 / sum(a_k^2 / (n_k - 1)) degrees of freedom (Satterthwaite 1946, Welch 1947), at least those of
    the task with the fewest. All of them would be too many where few seeds tell which task is the noisiest. For one
    task that is Student's t. It speaks of these tasks, not of all that could be. Needs two values in every task, and
    one task whose values differ.
    """
    if not by_task or min(map(len, by_task)) < 2 or all(max(v) - min(v) < TIE for v in by_task):
        return None
    shares = [variance(values) / len(values) for values in by_task]
    found = sum(shares) ** 2 / sum(a * a / (len(values) - 1) for a, values in zip(shares, by_task, strict=True))
    degrees = max(min(map(len, by_task)) - 1, REDUCTION * found)
    return Estimate(fmean(fmean(values) for values in by_task), math.sqrt(sum(shares)) / len(by_task), degrees)


class Decision(NamedTuple):
    """What Holm's method says of one of several p: the corrected p, and the level at which it was decided."""

    p_corrected: float
    level: float
    significant: bool


def holm(p: Sequence[float], alpha: float = 0.05) -> list[Decision]:
    """Decisions that bound the chance of any false finding in the family by `alpha` (Holm 1979), in the given order.

    From the smallest p on, each is held against alpha over the number of those that are left; the first that is larger
    ends it, and decides for all behind it too. An interval at the level of its own decision leaves out zero if and only
    if the corrected p is at most `alpha`.
    """
    order = sorted(range(len(p)), key=p.__getitem__)
    decisions: dict[int, Decision] = {}
    corrected, significant, level = 0.0, True, alpha
    for rank, index in enumerate(order):
        if significant:
            level = alpha / (len(p) - rank)
            significant = p[index] <= level
        corrected = max(corrected, min(1.0, (len(p) - rank) * p[index]))
        # Where the two differ by rounding alone, the decision holds.
        told = min(corrected, alpha) if significant else max(corrected, math.nextafter(alpha, 1.0))
        decisions[index] = Decision(told, level, significant)
    return [decisions[index] for index in range(len(p))]
