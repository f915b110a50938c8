"""The nearest change of a lower rank, and how far it is off; by factors alone, without the whole matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fish_tuning.sparse.compact import Factors


def truncated(factors: Factors, rank: float, rounding: float | None = None) -> Factors:
    """The factors of the nearest change of a lower rank, in the Frobenius norm: its largest singular components.

    Components that are zero go first, exactly; where no more than that has to go, the rest is given back as it is.

    Args:
        factors: of a layer, A (r, ...) and B (out, r, ...), in any floating dtype.
        rank: an int is the highest rank to keep; a float is the share of the squared singular values to keep, at the
            lowest rank that does.
        rounding: singular values up to this share of the largest are nothing but rounding; of what float64 leaves by
            default.

    Returns:
        Factors of the same scaling, dtypes and keys. B and A share the singular values evenly, so that neither is
        much smaller than the other. A change that is zero has rank 0.
    """
    working = factors.working()
    if not working.rank:
        return working
    left, values, right = _singular(working, rounding)
    kept = _rank_to_keep(values, rank)
    if kept >= working.rank:
        return working
    roots = values[:kept].sqrt()
    a = (right[:kept] * roots[:, None]).reshape(kept, *factors.a.shape[1:])
    b = (left[:, :kept] * roots).reshape(factors.b.shape[0], kept, *factors.b.shape[2:])
    return working._replace(a=a.to(factors.a), b=b.to(factors.b))


def norm(factors: Factors) -> float:
    """The Frobenius norm of the change."""
    return abs(factors.scaling) * _norm(*_matrices(factors))


def distance(one: Factors, other: Factors) -> float:
    """The Frobenius norm of the difference of two changes of one layer."""
    (a, b), (other_a, other_b) = _matrices(one), _matrices(other)
    return _norm(torch.cat([a, other_a]), torch.cat([one.scaling * b, -other.scaling * other_b], dim=1))


def _matrices(factors: Factors) -> tuple[Tensor, Tensor]:
    """A as (r, in) and B as (out, r), in float64 on the CPU, which every machine has."""
    a, b = (tensor.detach().cpu().double() for tensor in (factors.a, factors.b))
    return a.reshape(len(a), -1), b.reshape(len(b), -1)


def _norm(a: Tensor, b: Tensor) -> float:
    """Of B A, by its triangular factors: the product itself may be a thousand times larger than the two."""
    return float((torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T).norm())


def _singular(factors: Factors, rounding: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors (out, k), values and right vectors (k, in) of B A, without values that are rounding alone."""
    a, b = _matrices(factors)
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    if rounding is None:
        rounding = max(len(b), a.shape[1]) * torch.finfo(values.dtype).eps  # as LAPACK counts a matrix's rank
    rank = int((values > values[:1] * rounding).sum())
    return (left @ u)[:, :rank], values[:rank], (v @ right.T)[:rank]


def _rank_to_keep(values: Tensor, rank: float) -> int:
    if isinstance(rank, int):
        return min(rank, len(values))
    if rank >= 1:
        return len(values)
    shares = values.square().cumsum(0) / values.square().sum()
    return min(int((shares < rank).sum()) + 1, len(values))
