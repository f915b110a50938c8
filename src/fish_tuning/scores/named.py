"""Scores by name, for experiment files to choose from. Imports nothing heavy."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from fish_tuning.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn


class Score(Protocol):
    """From a model and its calibration examples to a score for every entry that has `requires_grad`.

    Returns {name as in `model.named_parameters()`: scores of the same shape}, finite, larger where an entry matters
    more. The model must be left as it was.
    """

    def __call__(
        self,
        model: nn.Module,
        calibration_dataloader: Iterable[Mapping[str, Any]],
        *,
        device: Any = None,
        seed: int = 0,
    ) -> dict[str, Tensor]: ...


SCORES: Registry[Score] = Registry("score")


def register_score(name: str) -> Any:
    """Decorator: a score of your own, which experiments name as `fish_tuning.score`.

    Example:
        >>> from fish_tuning import register_score
        >>> @register_score("magnitude")
        ... def magnitude(model, calibration_dataloader, *, device=None, seed=0):
        ...     return {n: p.detach().abs() for n, p in model.named_parameters() if p.requires_grad}
    """
    return SCORES.register(name)


def _fisher(
    fisher_type: str,
    model: nn.Module,
    calibration_dataloader: Iterable[Mapping[str, Any]],
    *,
    device: Any = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    from fish_tuning.scores.fisher import calculate_fisher_information

    return calculate_fisher_information(
        model,
        calibration_dataloader,
        device,
        fisher_type=fisher_type,  # type: ignore[arg-type]
        seed=seed,
        progress=False,
    )


for _name, _type in {"fisher": "empirical", "fisher_sampled": "sampled", "fisher_expected": "expected"}.items():
    register_score(_name)(functools.partial(_fisher, _type))
