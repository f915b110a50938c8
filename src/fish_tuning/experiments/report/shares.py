"""Shares of entries that masks keep, from run records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean

from fish_tuning.experiments.records.run_record import KeptShare, RunRecord

Shares = dict[tuple[int | None, str], float]  # by layer and module


def mean_shares(runs: Sequence[RunRecord]) -> Shares:
    """Kept over total for each layer and module (a weight with its bias), as a mean over runs."""
    shares: dict[tuple[int | None, str], list[float]] = defaultdict(list)
    for run in runs:
        sums: dict[tuple[int | None, str], list[int]] = defaultdict(lambda: [0, 0])
        for share in run.kept:
            sums[share.layer, share.module][0] += share.kept
            sums[share.layer, share.module][1] += share.total
        for key, (kept, total) in sums.items():
            shares[key].append(kept / total if total else 0.0)
    return {key: fmean(values) for key, values in shares.items()}


def factor_shares(kept: Iterable[KeptShare]) -> dict[str, tuple[int, int]]:
    """Kept and all entries of the factors A and B of LoRA; empty where there are none."""
    sums: dict[str, tuple[int, int]] = {}
    for share in kept:
        if share.module.endswith(("_A", "_B")):
            one, all_of_it = sums.get(share.module[-1], (0, 0))
            sums[share.module[-1]] = one + share.kept, all_of_it + share.total
    return sums


def percent(share: float) -> str:
    """`0` only for nothing, `100` only for all of it."""
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f}"
    if value < 0.05:
        return "<0.1"
    return f"{value:.1f}" if value < 9.95 else ">99" if value >= 99.5 else f"{value:.0f}"
