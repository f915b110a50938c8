"""Why tensors go through the loop, and what the user and the log are told of it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from fish_tuning.scores.probes import Probes

logger = logging.getLogger("fish_tuning.scores.fisher")

PADDING = "an example has another gradient by itself, without its padding and without the others of its batch"
DISAGREES = "its rule does not agree with the plain gradient"


def told_of(failed: Mapping[str, str], tensors: int) -> list[str]:
    """What to tell the user of rules that failed, each with the reason, for some of so many tensors."""
    return [
        f"Fisher information: the batched rule failed for {len(names)} of {tensors} tensors, e.g. "
        f"{names[0]!r}: {reason}. They are scored one example at a time, which is as exact, but slower."
        for reason in dict.fromkeys(failed.values())
        for names in [[name for name, why in failed.items() if why == reason]]
    ]


def log_choice(probes: Probes, looped: Mapping[str, str]) -> None:
    """How tensors are scored from now on; `looped` go through the loop, each for its reason."""
    again = probes.done_again()
    logger.info("Fisher information: %d tensors by rules of their layers.", len(probes.names) - len(again))
    if again:
        logger.info("Fisher information: %d tensors by modules done again, e.g. %s.", len(again), again[0])
    for reason, number in Counter(looped.values()).items():
        example = next(name for name, why in looped.items() if why == reason)
        logger.info("Fisher information: %d tensors by the loop (%s), e.g. %s.", number, reason, example)
