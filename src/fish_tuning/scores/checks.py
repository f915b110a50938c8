"""Whether a rule gives the plain gradient, its square or its signs too: by checksums, so that none has to be kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fish_tuning.devices import exact_dtype
from fish_tuning.scores.reading import placed, read
from fish_tuning.scores.totals import squared

Checksums = dict[str, Tensor]

# Squares agree when they differ by no more than this. Wrong rules are wrong by the order of the gradient itself;
# rounding is far below, except where a gradient is all rounding.
TOLERANCE = 1e-3
LOW_PRECISION_TOLERANCE = 0.1
NEGLIGIBLE_GRADIENT = 1e-4  # of the norm of an example's gradient over all tensors
_SUMS_OF_SQUARES, _PROJECTIONS = 2, 16


@dataclass
class Check:
    """A batched pass that is checked: what the rules found for some tensors, as checksums.

    For the tensors `alone`, the squares of one `row`. For those `together`, the square of the batch's gradient, in
    which the loss of each example is multiplied by its entry in the random `weights`: whatever a rule misses, in
    whichever example, shows there. Squares of single examples are freed of their weights. Where it is `signed`, the
    gradients are looked at beside their squares, which tell nothing of signs.
    """

    alone: frozenset[str]
    together: frozenset[str]
    row: int
    weights: Tensor  # all ones when there is nothing to look at together
    signed: bool = False
    of_row: Checksums = field(default_factory=dict)
    of_sum: Checksums = field(default_factory=dict)
    of_batch: Checksums = field(default_factory=dict)  # for those `together`, of what is added to the scores


def random_weights(size: int, seed: int) -> Tensor:
    """(size,) numbers of either sign between 1 and 2 in size: no gradients cancel, and none is lost beside another."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (size,), generator=generator) * 2 - 1
    return signs * (1 + torch.rand(size, generator=generator))


def add_checksum(sums: Checksums, name: str, squares: Tensor, gradient: Tensor | None = None) -> None:
    """Add the checksum of `squares`, and that of the signed `gradient` behind it, to those of the tensor `name`."""
    found = checksum(squares)
    if gradient is not None:
        found = torch.cat([found, projections(gradient)])
    sums[name] = sums[name] + found if name in sums else found


def add_plain_checksum(sums: Checksums, name: str, gradient: Tensor, signed: bool) -> None:
    """The same of a plain gradient, which is given up."""
    of_signs = [projections(gradient)] if signed else []
    found = torch.cat([checksum(squared(gradient)), *of_signs])
    sums[name] = sums[name] + found if name in sums else found


def checksum(squares: Tensor) -> Tensor:
    """Two sums that tell apart tensors of squares, in fp64: plain, and weighted by position."""
    rows, values = _by_rows(squares)
    width, exact = values.shape[1], exact_dtype(squares.device)
    of_rows, of_columns = values.sum(1).to(exact), values.sum(0).to(exact)
    columns = torch.arange(width, device=values.device)
    # The position of an entry is row * width + column: no tensor of positions is needed.
    weighted = width * (rows * of_rows).sum() + (columns * of_columns).sum()
    return torch.stack([of_rows.sum(), weighted / max(1, squares.numel() - 1)])


def projections(gradient: Tensor) -> Tensor:
    """a_k^T G b_k for seeded normal vectors a_k and b_k, in fp64.

    Linear in G, so those of a sum are the sum of those; the mean of their squares is on average the squared norm of G,
    hence that of the difference of two gradients from the differences of their projections. A plain sum would not do:
    where G's signs cancel, its negative has the same.
    """
    rows, values = _by_rows(gradient)
    height = gradient.shape[0] if gradient.dim() > 1 else 1
    generator = torch.Generator().manual_seed(0)
    left, right = (
        placed(torch.randn(length, _PROJECTIONS, generator=generator), values.device).to(values)
        for length in (height, values.shape[1])
    )
    with torch.autocast(values.device.type, enabled=False):
        of_rows = values @ right
    return (left[rows] * of_rows).to(exact_dtype(gradient.device)).sum(0)


def _by_rows(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the rows that are there, and their values (rows, width); a vector is one row."""
    if tensor.is_sparse:
        return tensor.indices()[0], tensor.values()
    values = tensor.reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1)
    return torch.arange(values.shape[0], device=values.device), values


def on_cpu(sums: Checksums) -> Checksums:
    """The checksums in fp64 on the CPU, with one wait for a device."""
    return {name: found.double() for name, found in zip(sums, read(sums.values()), strict=True)}


@dataclass
class Comparison:
    """Of the rules' checksums with plain gradients': who agrees, and who of these with a gradient that tells."""

    agree: set[str]
    disagree: set[str]
    right: set[str]

    @classmethod
    def of(cls, names: list[str], rule: Checksums, plain: Checksums, tolerance: float, floor: float) -> Comparison:
        """Of checksums on the CPU. `floor`: a squared norm at and below which a gradient may be all rounding."""
        if not names:
            return cls(set(), set(), set())
        length = max(map(len, (*rule.values(), *plain.values())), default=_SUMS_OF_SQUARES)
        no_gradient = torch.zeros(length, dtype=torch.float64)
        by_rule, by_plain = (torch.stack([sums.get(name, no_gradient) for name in names]) for sums in (rule, plain))
        of_squares, of_signs = (by_rule - by_plain).split([_SUMS_OF_SQUARES, length - _SUMS_OF_SQUARES], dim=1)
        norm = by_plain[:, :1].clamp(min=floor)  # squared
        # A square is off by twice what its gradient is off by; the same room is left to the gradient itself.
        agreeing = (of_squares.abs() <= 2 * tolerance * norm).all(dim=1)
        agreeing &= of_signs.square().sum(dim=1) <= _PROJECTIONS * (2 * tolerance) ** 2 * norm[:, 0]
        telling = by_plain[:, 0] > floor
        agree = {name for name, yes in zip(names, agreeing.tolist(), strict=True) if yes}
        tell = {name for name, yes in zip(names, telling.tolist(), strict=True) if yes}
        return cls(agree, set(names) - agree, agree & tell)
