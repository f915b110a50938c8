"""How far two masks agree, beside what chance would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fish_tuning.errors import MaskError
from fish_tuning.experiments.masks.mask_files import Inspected


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
        return (
            f"have tensors of other shapes (first {a} against {b}), so there is nothing to compare: their ranks differ"
        )
    return "have no masked tensor in common, so there is nothing to compare: they are of other models or methods"
