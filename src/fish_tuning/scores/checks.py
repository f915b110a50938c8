"""Whether a rule's squares are those of the plain gradient: by checksums, so that no gradient has to be kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

Checksums = dict[str, Tensor]

# Squares agree when they differ by no more than this. Wrong rules are wrong by the order of the gradient itself;
# rounding is far below, except where a gradient is all rounding.
TOLERANCE = 1e-3
LOW_PRECISION_TOLERANCE = 0.1
NEGLIGIBLE_GRADIENT = 1e-4  # of the norm of an example's gradient over all tensors
_NO_GRADIENT = torch.zeros(2, dtype=torch.float64)


@dataclass
class Check:
    """A batched pass that is checked: what the rules found for some tensors, as checksums.

    For the tensors `alone`, the squares of one `row`. For those `together`, the square of the batch's gradient, in
    which the loss of each example is multiplied by its entry in the random `weights`: whatever a rule misses, in
    whichever example, shows there. Squares of single examples are freed of their weights.
    """

    alone: frozenset[str]
    together: frozenset[str]
    row: int
    weights: Tensor  # all ones when there is nothing to look at together
    of_row: Checksums = field(default_factory=dict)
    of_sum: Checksums = field(default_factory=dict)
    of_batch: Checksums = field(default_factory=dict)  # for those `together`, of what is added to the scores


def random_weights(size: int, seed: int) -> Tensor:
    """(size,) numbers of either sign between 1 and 2 in size: no gradients cancel, and none is lost beside another."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (size,), generator=generator) * 2 - 1
    return signs * (1 + torch.rand(size, generator=generator))


def add_checksum(sums: Checksums, name: str, squares: Tensor) -> None:
    """Add the checksum of `squares` to those of the tensor `name`."""
    sums[name] = sums[name] + checksum(squares) if name in sums else checksum(squares)


def checksum(squares: Tensor) -> Tensor:
    """Two sums that tell apart tensors of squares, in fp64: plain, and weighted by position."""
    if squares.is_sparse:
        rows, values = squares.indices()[0], squares.values()
    else:
        values = squares.reshape(squares.shape[0] if squares.dim() > 1 else 1, -1)
        rows = torch.arange(values.shape[0], device=values.device)
    width = values.shape[1]
    exact = torch.float32 if squares.device.type == "mps" else torch.float64
    of_rows, of_columns = values.sum(1).to(exact), values.sum(0).to(exact)
    columns = torch.arange(width, device=values.device)
    # The position of an entry is row * width + column: no tensor of positions is needed.
    weighted = width * (rows * of_rows).sum() + (columns * of_columns).sum()
    return torch.stack([of_rows.sum(), weighted / max(1, squares.numel() - 1)])


@dataclass
class Comparison:
    """Of the rules' checksums with plain gradients': who agrees, and who of these with a gradient that tells."""

    agree: set[str]
    disagree: set[str]
    right: set[str]

    @classmethod
    def of(cls, names: list[str], rule: Checksums, plain: Checksums, tolerance: float, floor: float) -> Comparison:
        """`floor`: a squared norm at and below which a gradient may be nothing but rounding."""
        if not names:
            return cls(set(), set(), set())
        by_rule, by_plain = (
            torch.stack([sums.get(name, _NO_GRADIENT).cpu().double() for name in names]) for sums in (rule, plain)
        )
        # A square is off by twice what its gradient is off by.
        agreeing = ((by_rule - by_plain).abs() <= 2 * tolerance * by_plain[:, :1].clamp(min=floor)).all(dim=1)
        telling = by_plain[:, 0] > floor
        agree = {name for name, yes in zip(names, agreeing.tolist(), strict=True) if yes}
        tell = {name for name, yes in zip(names, telling.tolist(), strict=True) if yes}
        return cls(agree, set(names) - agree, agree & tell)
