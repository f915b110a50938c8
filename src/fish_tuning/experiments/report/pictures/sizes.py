"""How large arms are, in the one number that all of them have."""

from __future__ import annotations

from collections.abc import Sequence

from fish_tuning.experiments.records.run_record import RunRecord


def arm_sizes(runs: Sequence[RunRecord]) -> tuple[dict[str, int], str]:
    """For each arm, the most of its runs; and what was counted.

    That is the entries that were chosen, without the head, which every arm trains. Older records only have the number
    of all trainable parameters; where one has, it is that for all.
    """
    chosen = all(run.kept_parameters is not None for run in runs)
    sizes: dict[str, int] = {}
    for run in runs:
        size = run.kept_parameters if chosen else run.trainable_parameters
        if size is not None:
            sizes[run.arm] = max(size, sizes.get(run.arm, 0))
    return sizes, "kept" if chosen else "trainable"
