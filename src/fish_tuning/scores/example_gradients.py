"""The gradients of a batch's examples, as what gives their sum and the sum of their squares.

They rarely lie in memory whole: one layer's would be the batch size times the layer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Entries of per-example gradients held at a time (fp32: 16 MiB), however many examples a batch has.
CHUNK_ENTRIES = 2**22
# Tensors of more entries have one example after another multiplied and added while it is in a cache, which costs less
# than to write many to memory and read them again. On a GPU, which does many in one operation, those of which few fit.
_LARGE, _LARGE_ON_GPU = 2**17, 2**21


class ExampleGradients(Protocol):
    """One tensor's gradients G_n. Both sums have the tensor's shape, dense or sparse by rows."""

    def sum(self) -> Tensor:
        """sum_n G_n."""

    def squares(self) -> Tensor:
        """sum_n G_n^2."""


@dataclass(frozen=True)
class Each:
    """Small ones, as they are: (n, *shape)."""

    gradients: Tensor

    def sum(self) -> Tensor:
        return self.gradients.sum(0)

    def squares(self) -> Tensor:
        return self.gradients.square().sum(0)


@dataclass(frozen=True)
class OuterProducts:
    """G_n = g_n^T x_n for g (n, P, o) and x (n, P, i), as (o, i).

    `dtype`: of the G_n before they are squared in fp32. That of bf16, where g and x are of it, as autograd has them.
    """

    g: Tensor
    x: Tensor
    dtype: torch.dtype = torch.float32

    @property
    def are_large(self) -> bool:
        """Whether one example after another is multiplied, since few of the G_n would be held."""
        return self.g.shape[2] * self.x.shape[2] > (_LARGE if self.g.device.type == "cpu" else _LARGE_ON_GPU)

    def sum(self) -> Tensor:
        return self.g.flatten(0, 1).T @ self.x.flatten(0, 1)

    def squares(self) -> Tensor:
        """In parts of bounded size."""
        g, x = self.g, self.x
        examples, positions, height = g.shape
        entries = height * x.shape[2]
        if positions == 1:  # the square of an outer product is the outer product of the squares
            return g[:, 0].square().T @ x[:, 0].square()
        if self.dtype != torch.float32:
            g, x = g.to(self.dtype), x.to(self.dtype)
        if self.are_large:
            return self._one_by_one(g, x)
        if examples * entries <= CHUNK_ENTRIES:
            return torch.bmm(g.transpose(1, 2), x).float().square_().sum(0)
        parts = [
            torch.bmm(g_part.transpose(1, 2), x_part).float().square_().sum(0)
            for g_part, x_part in _chunks(g, x, entries=entries)
        ]
        return functools.reduce(Tensor.add_, parts)

    def _one_by_one(self, g: Tensor, x: Tensor) -> Tensor:
        total = self.g.new_empty(g.shape[2], x.shape[2])
        height = max(1, CHUNK_ENTRIES // x.shape[2])
        product = g.new_empty(min(height, g.shape[2]), x.shape[2])
        exact = product if product.dtype == total.dtype else torch.empty_like(product, dtype=total.dtype)
        for rows, g_rows in zip(total.split(height), g.transpose(1, 2).split(height, dim=1), strict=True):
            one, square = product[: len(rows)], exact[: len(rows)]
            for number in range(len(x)):
                torch.mm(g_rows[number], x[number], out=one)
                if exact is not product:
                    square.copy_(one)
                if number:
                    rows.addcmul_(square, square)
                else:
                    torch.mul(square, square, out=rows)
        return total


@dataclass(frozen=True)
class Stacked:
    """Parts put one after another along the tensor's first dimension, in its shape."""

    parts: Sequence[ExampleGradients]
    shape: torch.Size

    def sum(self) -> Tensor:
        return torch.cat([part.sum() for part in self.parts]).view(self.shape)

    def squares(self) -> Tensor:
        return torch.cat([part.squares() for part in self.parts]).view(self.shape)


@dataclass(frozen=True)
class OfRows:
    """Each example touches few rows of a table, so its gradient is kept for those alone, and sums are sparse.

    Args:
        ids: (n, P), the row that each position reads.
        g: (n, P, width), the gradient of what was read.
        rows: of the table.
        without: a row that gets no gradient, if there is one.
    """

    ids: Tensor
    g: Tensor
    rows: int
    without: int | None = None

    def sum(self) -> Tensor:
        return self._over_examples(*self.of_cells())

    def squares(self) -> Tensor:
        cells, gradients = self.of_cells()
        return self._over_examples(cells, gradients.square_())

    def of_cells(self) -> tuple[Tensor, Tensor]:
        """Each example's gradient of the rows that it touches; a cell is an example and a row."""
        examples = torch.arange(self.ids.shape[0], device=self.ids.device)[:, None]
        cells, inverse = (examples * self.rows + self.ids).flatten().unique(return_inverse=True)
        gradients = _scatter_add(len(cells), inverse, self.g.reshape(-1, self.g.shape[-1]))
        if self.without is not None:
            gradients.masked_fill_((cells % self.rows == self.without)[:, None], 0)
        return cells, gradients

    def _over_examples(self, cells: Tensor, values: Tensor) -> Tensor:
        rows, inverse = (cells % self.rows).unique(return_inverse=True)
        shape = (self.rows, values.shape[1])
        values = _scatter_add(len(rows), inverse, values)
        # Said twice, since torch 2.11 warns of sums of sparse tensors where it was not said for the process too.
        with torch.sparse.check_sparse_tensor_invariants(False):
            return torch.sparse_coo_tensor(rows[None], values, shape, is_coalesced=True, check_invariants=False)


@dataclass(frozen=True)
class OfTable:
    """Of a table that is read and multiplied with: an embedding that is the output layer's weight too."""

    read: OfRows
    multiplied: OuterProducts

    def sum(self) -> Tensor:
        total, read = self.multiplied.sum(), self.read.sum()
        return total.index_add_(0, read.indices()[0], read.values())

    def squares(self) -> Tensor:
        """(a + b)^2 = a^2 + b (2 a + b), where b, of what was read, is zero but for few rows."""
        total = self.multiplied.squares()
        cells, read = self.read.of_cells()
        examples, rows = cells // self.read.rows, cells % self.read.rows
        for example, (g, x) in enumerate(zip(self.multiplied.g, self.multiplied.x, strict=True)):
            own = examples == example
            multiplied = g[:, rows[own]].T @ x
            total.index_add_(0, rows[own], read[own] * (2 * multiplied + read[own]))
        return total


def _chunks(*tensors: Tensor, entries: int) -> Iterator[tuple[Tensor, ...]]:
    size = max(1, CHUNK_ENTRIES // entries)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _scatter_add(size: int, index: Tensor, values: Tensor) -> Tensor:
    """Rows of `values` added up by `index`, in the same order every time on either kind of device."""
    total = values.new_zeros(size, values.shape[1])
    if values.device.type == "cpu":
        return total.index_add_(0, index, values)
    return total.index_put_((index,), values, accumulate=True)
