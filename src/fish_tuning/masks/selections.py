"""Selections by name: from scores to priorities, of which the largest are kept. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fish_tuning.errors import MaskError
from fish_tuning.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Priority = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True)
class Selection:
    """How entries are chosen: those of the largest `priority`; `needs_scores` is false where any scores will do."""

    priority: Priority
    needs_scores: bool = True


SELECTIONS: Registry[Selection] = Registry("method")  # as `create_mask_from_fisher` calls its argument


def register_selection(name: str, *, needs_scores: bool = True) -> Callable[[Priority], Priority]:
    """Decorator: a selection of your own, from a chunk of scores to priorities of the same shape; the largest are kept.

    `create_mask_from_fisher` takes its name as `method`, and experiments as the end of an arm's name: `lora-<name>`.
    The function is called several times on each chunk and must give the same numbers every time; chance belongs to the
    seeded order of ties.

    Args:
        name: small letters, digits and `_`.
        needs_scores: false where the choice does not depend on the scores, which are then not computed for it.

    Example:
        >>> import torch
        >>> from fish_tuning import create_mask_from_fisher, register_selection
        >>> @register_selection("middle")
        ... def middle(scores):
        ...     return -(scores - 2).abs()
        >>> create_mask_from_fisher({"a": torch.tensor([1.0, 2.0, 9.0])}, num_trainable=1, method="middle")["a"]
        tensor([False,  True, False])
    """

    def register(priority: Priority) -> Priority:
        SELECTIONS.register(name)(Selection(priority, needs_scores))
        return priority

    return register


def priorities_of(priority: Priority, scores: Tensor, name: str) -> Tensor:
    """`priority(scores)`, scores of the tensor `name`; MaskError where they do not order the entries."""
    values = priority(scores)
    if values.shape != scores.shape:
        raise MaskError("The selection method must give a priority for each score, in the same shape.")
    if values.isnan().any():
        raise MaskError(f"The selection method gave priorities for {name!r} that are not numbers (NaN).")
    return values


@register_selection("fish")
def _fish(scores: Tensor) -> Tensor:
    """The largest scores."""
    return scores


@register_selection("rand", needs_scores=False)
def _rand(scores: Tensor) -> Tensor:
    """All tie, so the seeded order decides."""
    return scores.new_zeros(scores.shape)


@register_selection("rev")
def _rev(scores: Tensor) -> Tensor:
    """The smallest scores."""
    return -scores
