"""How far two masks agree, beside what chance would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from fish_tuning.errors import MaskError
from fish_tuning.experiments.masks.mask_files import Inspected
from fish_tuning.experiments.report.tables import plain_table

if TYPE_CHECKING:
    from rich.table import Table

LEGEND = (
    "By chance: of random masks of these sizes. Per tensor: of random masks that keep as many entries in each tensor "
    "as these do; only what lies above that is agreement on entries rather than on tensors."
)


@dataclass(frozen=True)
class Overlap:
    """How far two masks agree on `total` entries. `by_tensor`: expected in common if each tensor were drawn anew."""

    kept: tuple[int, int]
    both: int
    total: int
    by_tensor: float
    left_out: int  # tensors that only one of them has, or in another shape

    @property
    def by_chance(self) -> float:
        """Expected in common of two random masks of these sizes."""
        return self.kept[0] * self.kept[1] / self.total


def overlap(one: Inspected, other: Inspected) -> Overlap:
    """How far two masks agree on the tensors that both have, without those that are dense in both."""
    pairs = [
        (tensor, other.tensors[name])
        for name, tensor in one.tensors.items()
        if name in other.tensors and not (name in one.dense and name in other.dense)
    ]
    common = [(a, b) for a, b in pairs if a.shape == b.shape]
    if not common:
        raise MaskError(f"{str(one.path)!r} and {str(other.path)!r} {_why_apart(one, other, pairs)}.")
    kept = [(int(a.sum()), int(b.sum()), a.numel()) for a, b in common]
    sizes = sum(a for a, _, _ in kept), sum(b for _, b, _ in kept)
    if not all(sizes):
        raise MaskError(f"{str((other if sizes[0] else one).path)!r} keeps no entry of the tensors in common.")
    return Overlap(
        sizes,
        both=sum(int((a & b).sum()) for a, b in common),
        total=sum(total for _, _, total in kept),
        by_tensor=sum(a * b / total for a, b, total in kept if total),
        left_out=len(one.masked.keys() | other.masked.keys()) - len(common),
    )


def _why_apart(one: Inspected, other: Inspected, pairs: Sequence[tuple[Tensor, Tensor]]) -> str:
    if not one.masked or not other.masked:
        return "cannot be compared: no tensor is masked in " + ("the first" if not one.masked else "the second")
    if pairs:
        a, b = (" x ".join(map(str, tensor.shape)) for tensor in pairs[0])
        return f"have tensors of other shapes (first {a} against {b}), so there is nothing to compare: other ranks?"
    return "have no masked tensor in common, so there is nothing to compare: other models or methods?"


def overlap_table(pairs: Mapping[tuple[int, int], Overlap]) -> Table:
    headers = [
        "masks",
        "kept by both",
        "of the smaller",
        "by chance",
        "by chance per tensor",
        "Jaccard",
        "by chance",
    ]
    rows = [
        [
            f"{a + 1}, {b + 1}",
            f"{pair.both:,}",
            *(f"{percent(common, min(pair.kept))}%" for common in (pair.both, pair.by_chance, pair.by_tensor)),
            *(f"{common / (sum(pair.kept) - common):.3f}" for common in (pair.both, pair.by_chance)),
        ]
        for (a, b), pair in pairs.items()
    ]
    return plain_table(headers, rows)


def percent(part: float, whole: float) -> str:
    """`12.3`; `0` and `100` are exact, `<0.1` is little but not nothing."""
    if part in (0, whole):
        return "0" if part == 0 else "100"
    value = 100 * part / whole
    return "<0.1" if value < 0.05 else f"{value:.1f}"
