"""Parts of an experiment's runs, for several machines that share no folder."""

from __future__ import annotations

from typing import NamedTuple

from fish_tuning.errors import ConfigurationError


class Shard(NamedTuple):
    """Part `number` of `of` parts of the runs, from 1: every `of`-th run."""

    number: int = 1
    of: int = 1


WHOLE = Shard()


def parse_shard(text: str | None) -> Shard:
    """`2/4` as a Shard; None for the whole. Raises ConfigurationError for anything else."""
    if text is None:
        return WHOLE
    number, _, of = text.partition("/")
    if number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of):
        return Shard(int(number), int(of))
    raise ConfigurationError(f"--shard {text}: must be I/N with I from 1 to N, such as 1/4.")
