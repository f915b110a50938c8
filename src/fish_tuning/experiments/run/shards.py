"""Parts of an experiment's runs, for several machines that share no folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.records.run_record import ArmPlan


class Shard(NamedTuple):
    """Part `number` of `of` parts of the runs, from 1: every `of`-th run."""

    number: int = 1
    of: int = 1

    def part(self, arms: Sequence[ArmPlan], seeds: Sequence[int]) -> list[tuple[ArmPlan, int]]:
        """This part of all runs, seed by seed."""
        return [(arm, seed) for seed in seeds for arm in arms][self.number - 1 :: self.of]


WHOLE = Shard()


def parse_shard(text: str | None) -> Shard:
    """`2/4` as a Shard; None for the whole. Raises ConfigurationError for anything else."""
    if text is None:
        return WHOLE
    number, _, of = text.partition("/")
    if number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of):
        return Shard(int(number), int(of))
    raise ConfigurationError(f"--shard {text}: must be I/N with I from 1 to N, such as 1/4.")
