"""One row of positions that serves all examples, expanded to a row each: where a model cannot take that, found out."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fish_tuning.errors import out_of_memory
from fish_tuning.scores.probes import Probes

Attempt = Callable[[], list[Tensor]]


def with_expansion_if_possible(attempt: Attempt, probes: Probes) -> list[Tensor]:
    """`attempt()`, a forward pass, with those layers left as they are that the model fails on when expanded.

    A model that repeats its one row by itself cannot take a row for each example. Any other error is raised as it came:
    it is one of an expansion only when it comes twice, and not without the expansion.
    """
    try:
        return attempt()
    except (RuntimeError, ValueError) as first:
        layers = list(probes.expanded)
        if not layers or out_of_memory(first) or not _fails_again(attempt, first):
            raise
        repeated = probes.state.repeated
        for chosen in (*([layer] for layer in layers), layers):
            modules = {layer.module for layer in chosen}
            repeated |= modules
            try:
                return attempt()
            except (RuntimeError, ValueError) as other:
                if out_of_memory(other):
                    raise
            repeated -= modules
        raise


def _fails_again(attempt: Attempt, first: Exception) -> bool:
    try:
        attempt()
    except (RuntimeError, ValueError) as again:
        return type(again) is type(first) and str(again) == str(first)
    return False
