"""Which of the processes of a launch this one is: torchrun and accelerate tell by environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from fish_tuning.errors import ConfigurationError

if TYPE_CHECKING:
    from fish_tuning.experiments.config.experiment import ExperimentConfig


class Launch(NamedTuple):
    """Process `rank` of `number`, the `local_rank`-th of its host; all from 0."""

    rank: int = 0
    number: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether it decides, writes and prints for all."""
        return self.rank == 0

    @property
    def is_first_of_host(self) -> bool:
        return self.local_rank == 0

    def __str__(self) -> str:
        return f"process {self.rank} of {self.number}"


ALONE = Launch()


def this_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """What RANK, WORLD_SIZE and LOCAL_RANK say; one process where they say nothing."""
    rank, number, local = (environment.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not (rank.isdigit() and number.isdigit() and int(number) > 1):
        return ALONE
    return Launch(int(rank), int(number), int(local) if local.isdigit() else int(rank))


def check_launch(config: ExperimentConfig, launch: Launch) -> None:
    """Refuse what needs several processes, in one that was not launched with others."""
    if launch.number > 1:
        return
    for section in config.peft:
        asked = {**config.training.args_override, **config.dataset.training_args, **section.training_args}.get("fsdp")
        if asked:
            raise ConfigurationError(
                f"training.args_override.fsdp={asked!r} shards over several processes, and this is one. Start it with "
                "accelerate launch or torchrun, or leave fsdp out."
            )
