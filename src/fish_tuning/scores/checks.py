"""Whether a rule gives the plain gradient, its square or its signs too: by checksums, so that none has to be kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fish_tuning.scores.mixed_precision import without_autocast
from fish_tuning.scores.reading import placed, read

Checksums = dict[str, Tensor]

# Gradients agree when they differ by no more than this, squares by twice as much. Wrong rules are wrong by the order of
# the gradient itself; rounding is below: of 55,000 tensors of 330 models it made at most 0.017 of squares in bfloat16
# and 0.003 in float16, where the least wrong rule made 0.12.
TOLERANCE = 1e-3
_TOLERANCES = {torch.float64: TOLERANCE, torch.float32: TOLERANCE, torch.bfloat16: 0.02, torch.float16: 0.004}
_OF_INTEGERS = _TOLERANCES[torch.bfloat16]  # weights are stored in them, and computed with in 16 or 32 bits
_OF_OTHERS = 0.1  # floats of 8 bits
# Of `distance` from an example by itself to it in its batch, since another shape rounds otherwise: 0.03 to 0.08 in
# bfloat16 for a language model of 30 layers and 0.2 to 1 for models that read their padding; in float16 a seventh for
# the former and the same for the latter.
_ROOMS_ALONE = {torch.bfloat16: 0.2, torch.float16: 0.04}
_ROOM_OF_OTHERS = 0.4
# Of the norm of an example's gradient over all tensors, what may be all rounding in 32 bits, and in fewer.
NEGLIGIBLE_GRADIENT, NEGLIGIBLE_IN_16_BITS = 1e-5, 1e-4
_NOISE = 0.01  # of the square of that, by which gradients that are all rounding may differ, in squares or in signs
_NOTHING = 1e-30  # of a squared norm: where squares vanish in 32 bits
_PROJECTIONS = 16
_KEPT_LENGTH = 2**16  # of vectors: longer ones are few, and take memory


def tolerance(dtypes: set[torch.dtype]) -> float:
    """Of what is computed in these dtypes."""
    return max(map(_tolerance_of, dtypes), default=TOLERANCE)


def _tolerance_of(dtype: torch.dtype) -> float:
    return _TOLERANCES.get(dtype, _OF_OTHERS if dtype.is_floating_point else _OF_INTEGERS)


def room_alone(dtypes: set[torch.dtype]) -> float:
    """For the `distance` of an example by itself from the same one in its batch; of 16 bits and fewer."""
    short = dtypes - {torch.float32, torch.float64}
    return max((_ROOMS_ALONE.get(dtype, _ROOM_OF_OTHERS) for dtype in short), default=TOLERANCE)


def random_weights(size: int, seed: int) -> Tensor:
    """(size,) numbers of either sign between 1 and 2 in size: no gradients cancel, and none is lost beside another."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (size,), generator=generator, device="cpu") * 2 - 1
    return signs * (1 + torch.rand(size, generator=generator, dtype=torch.float32, device="cpu"))


class Checksumming:
    """Makes checksums of squares, and where it is `signed`, of the gradients behind them too.

    The vectors that they multiply with are made once: on a GPU, where each operation on a small tensor costs the same,
    checksums of many of them would cost more than the gradients.
    """

    def __init__(self, signed: bool = False) -> None:
        self.signed = signed
        self._vectors: dict[tuple[str, int, torch.device], Tensor] = {}

    def add(self, sums: Checksums, name: str, squares: Tensor, gradient: Callable[[], Tensor]) -> None:
        """Add the checksum of the tensor `name`; `gradient` is called only where it is wanted."""
        self._add(sums, name, squares, self.checksum(gradient()) if self.signed else None)

    def add_gradient(self, sums: Checksums, name: str, gradient: Tensor) -> None:
        """The same of a gradient, plain or a sum by a rule."""
        self.add(sums, name, gradient.square(), lambda: gradient)

    def _add(self, sums: Checksums, name: str, squares: Tensor, of_signs: Tensor | None) -> None:
        of_squares = self.checksum(squares)
        found = of_squares if of_signs is None else torch.cat([of_squares, of_signs])
        sums[name] = sums[name] + found if name in sums else found

    def checksum(self, tensor: Tensor) -> Tensor:
        """(17,) the sum of all entries T, and 16 projections a_k^T T b_k for vectors a_k and b_k of drawn signs.

        They are linear in T, so those of a sum are the sum of those; the mean of the projections' squares is on average
        the squared norm of T, hence that of the difference of two tensors from the differences of their projections:
        entries in another place, or of another sign, show as what they are. Sums alone do not tell: weighted by their
        place, those of rows side by side in a large table are the same but for rounding in 16 bits.
        """
        rows, values, height = _by_rows(tensor)
        left = self._vector("left", height, values.device)
        right = self._vector("right", values.shape[1], values.device)
        with without_autocast(values.device):
            return ((left if rows is None else left[rows]) * (values.float() @ right)).sum(0)

    def _vector(self, side: str, length: int, device: torch.device) -> Tensor:
        """(length, 17) ones, and signs that are the same in every pass."""
        key = side, length, device
        if key in self._vectors:
            return self._vectors[key]
        generator = torch.Generator().manual_seed(0 if side == "left" else 1)
        signs = torch.ones(length, 1 + _PROJECTIONS, dtype=torch.float32, device="cpu")
        signs[:, 1:] = torch.randint(2, (length, _PROJECTIONS), generator=generator, device="cpu") * 2 - 1
        made = placed(signs, device)
        if length <= _KEPT_LENGTH:
            self._vectors[key] = made
        return made


def _by_rows(tensor: Tensor) -> tuple[Tensor | None, Tensor, int]:
    """Numbers of the rows that are there (None: all), their values (rows, width), and how many there could be.

    A vector is one row.
    """
    if tensor.is_sparse:
        return tensor.indices()[0], tensor.values(), tensor.shape[0]
    values = tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(1, -1)
    return None, values, values.shape[0]


@dataclass
class Check:
    """A batched pass that is checked: what the rules found for some tensors, as checksums.

    For the tensors `alone`, the squares of some `rows`. For those `together`, the square of the batch's gradient, in
    which the loss of each example is multiplied by its entry in the random `weights`: whatever a rule misses, in
    whichever example, shows there. Squares of single examples are freed of their weights. Where its
    checksums are signed, the gradients are looked at beside their squares, which tell nothing of signs.
    """

    alone: frozenset[str]
    together: frozenset[str]
    rows: Sequence[int]
    weights: Tensor  # all ones when there is nothing to look at together
    made: Checksumming = field(default_factory=Checksumming)
    of_row: Checksums = field(default_factory=dict)
    of_sum: Checksums = field(default_factory=dict)
    of_batch: Checksums = field(default_factory=dict)  # for those `together`, of what is added to the scores


def _norms(checksums: Tensor) -> Tensor:
    """The squared norms of the tensors that these are the checksums of, by their projections."""
    return checksums[:, 1:].square().sum(dim=1) / _PROJECTIONS


def distance(one: Checksums, other: Checksums) -> float:
    """How far apart the squares of two gradients of a model are: 0 for the same, some 1.4 for unlike ones.

    The mean over tensors, each by its share in the squared norms. Both are on the CPU.
    """
    no_gradient = torch.zeros(1 + _PROJECTIONS, dtype=torch.float64, device="cpu")
    if not (names := one.keys() | other.keys()):
        return 0.0
    these, those = (
        torch.stack([sums.get(name, no_gradient)[: 1 + _PROJECTIONS] for name in names]) for sums in (one, other)
    )
    nothing = torch.finfo(torch.float64).tiny
    apart = (_norms(these - those) / torch.maximum(_norms(these), _norms(those)).clamp(min=nothing)).sqrt()
    size = these[:, 0] + those[:, 0]
    return float((apart * size).sum() / size.sum().clamp(min=nothing))


class Floor:
    """The squared norm at and below which an example's gradient of a tensor may be nothing but rounding."""

    def __init__(self, short: bool) -> None:
        self._share = NEGLIGIBLE_IN_16_BITS if short else NEGLIGIBLE_GRADIENT
        self._scale = 0.0  # squared norm of an example's gradient over all tensors, the largest seen

    def of(self, gradients: Checksums, examples: int = 1) -> float:
        """Of these gradients of so many examples, which are on the CPU."""
        total = sum(float(sums[0]) for sums in gradients.values()) / examples
        if math.isfinite(total):
            self._scale = max(self._scale, total)
        return self._share**2 * self._scale


def on_cpu(sums: Checksums) -> Checksums:
    """The checksums in fp64 on the CPU, with one wait for a device."""
    return {name: found.double() for name, found in zip(sums, read(sums.values()), strict=True)}


@dataclass
class Comparison:
    """Of the rules' checksums with plain gradients': who agrees, and who of these with a gradient that tells."""

    agree: set[str]
    disagree: set[str]
    right: set[str]

    def beside(self, other: Comparison) -> Comparison:
        """Both together: who agrees agrees in both, and what tells tells in either."""
        agree, disagree = self.agree & other.agree, self.disagree | other.disagree
        return Comparison(agree, disagree, (self.right | other.right) & agree)

    @classmethod
    def of(cls, names: list[str], rule: Checksums, plain: Checksums, tolerance: float, floor: float) -> Comparison:
        """Of checksums on the CPU. `floor`: a squared norm at and below which a gradient may be all rounding."""
        if not names:
            return cls(set(), set(), set())
        length = max(map(len, (*rule.values(), *plain.values())), default=1 + _PROJECTIONS)
        no_gradient = torch.zeros(length, dtype=torch.float64, device="cpu")
        by_rule, by_plain = (torch.stack([sums.get(name, no_gradient) for name in names]) for sums in (rule, plain))
        squares, signs = (by_rule - by_plain).split([1 + _PROJECTIONS, length - 1 - _PROJECTIONS], dim=1)
        norm = by_plain[:, 0]  # squared
        telling = norm > floor
        # A square is off by twice what its gradient is off by; the same room is left to the gradient itself.
        room = 2 * tolerance
        noise = max(room, _NOISE) * floor
        agreeing = squares[:, 0].abs() <= (room * norm).clamp(min=noise)
        in_place = _norms(squares) <= room**2 * _norms(by_plain[:, : 1 + _PROJECTIONS])
        agreeing &= in_place | (squares.isfinite().all(dim=1) & ~telling)
        agreeing &= _norms(signs) <= (room**2 * norm).clamp(min=noise)
        agreeing &= (by_rule[:, 0] != 0) | (norm < _NOTHING)  # a rule that sees nothing of a tensor is no rounding
        telling |= (norm > 0) & in_place & (squares[:, 0].abs() <= room * norm) & (_norms(signs) <= room**2 * norm)
        agree = {name for name, yes in zip(names, agreeing.tolist(), strict=True) if yes}
        tell = {name for name, yes in zip(names, telling.tolist(), strict=True) if yes}
        return cls(agree, set(names) - agree, agree & tell)
