"""Scores by name: what an entry is judged by, as a function of what a calibration pass tells of it.

Imports nothing heavy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fish_tuning.errors import FisherError
from fish_tuning.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ScoreFunction = Callable[["Evidence"], "Tensor"]
MEAN_GRADIENT, MEAN_SQUARE = "mean_gradient", "mean_square"


@dataclass(frozen=True)
class Evidence:
    """What is known of one tensor's entries when they are scored.

    Args:
        name: of the tensor, as in `model.named_parameters()`.
        weight: its values, without gradient, where the gradients were measured: after warm-up, if there was any.
        moments: `mean_gradient` and `mean_square`, as far as the score needs them, in fp32 unless asked otherwise.
        num_samples: examples that they are means of; 0 where nothing was measured.
        batch_size: examples of one training step.
        seed: of what is drawn.
    """

    name: str
    weight: Tensor
    moments: dict[str, Tensor]
    num_samples: int
    batch_size: int
    seed: int

    @property
    def mean_gradient(self) -> Tensor:
        """(1/N) sum_n of the gradient of example n's loss."""
        return self._moment(MEAN_GRADIENT)

    @property
    def mean_square(self) -> Tensor:
        """(1/N) sum_n of its square: the Fisher information."""
        return self._moment(MEAN_SQUARE)

    @property
    def generator(self) -> torch.Generator:
        """A new one on the CPU for this tensor and seed, the same every time."""
        import torch

        digest = hashlib.sha256(f"{self.seed} {self.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7]))

    def _moment(self, name: str) -> Tensor:
        if name not in self.moments:
            raise FisherError(f"The score uses {name} and does not say so: register it with needs=({name!r},).")
        return self.moments[name]


@dataclass(frozen=True)
class Score:
    """A registered score: its function, which moments it needs, and under which labels they are measured."""

    function: ScoreFunction
    needs: tuple[str, ...] = ()
    fisher_type: str = "empirical"


SCORES: Registry[Score] = Registry("score")


def register_score(
    name: str, *, needs: tuple[str, ...] = (), fisher_type: str = "empirical"
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Decorator: a score of your own, for `calculate_scores` and the experiment file's `fish_tuning.score`.

    The function gets the `Evidence` of one tensor at a time and returns scores of the tensor's shape: finite, larger
    where an entry matters more. Selections compare them over all tensors, so their scale must mean the same everywhere.

    Args:
        name: small letters, digits and `_`.
        needs: which of "mean_gradient" and "mean_square" it uses; with none there is no calibration pass.
        fisher_type: the labels under which the squares are taken, as in `calculate_fisher_information`.

    Example:
        >>> from fish_tuning import register_score
        >>> @register_score("signal_to_noise", needs=("mean_gradient", "mean_square"))
        ... def signal_to_noise(evidence):
        ...     return evidence.mean_gradient.square() / evidence.mean_square.clamp(min=1e-30)
    """
    unknown = [need for need in needs if need not in (MEAN_GRADIENT, MEAN_SQUARE)]
    if unknown:
        raise FisherError(f"needs={needs!r}: {unknown[0]!r} is not known; allowed are mean_gradient and mean_square.")

    def register(function: ScoreFunction) -> ScoreFunction:
        SCORES.register(name)(Score(function, tuple(needs), fisher_type))
        return function

    return register


@register_score("gain", needs=(MEAN_GRADIENT, MEAN_SQUARE))
def gain(evidence: Evidence) -> Tensor:
    """What a step of Adam gains on an entry, to first order and up to its learning rate: g^2 / sqrt(g^2 + s^2 / b).

    Adam moves an entry by about its gradient over the root of the mean square of the gradients that it meets, which are
    those of batches: g^2 + s^2 / b, with s^2 = F - g^2 the variance over examples and b the batch size. g^2 is freed of
    the part that is chance, s^2 / (N - 1).
    """
    samples = evidence.num_samples
    if samples < 2:
        raise FisherError(f"score='gain' needs the variance over examples, so at least 2 of them; there was {samples}.")
    signal = evidence.mean_gradient.square()
    variance = (evidence.mean_square - signal).clamp_(min=0)
    signal = signal.sub_(variance / (samples - 1)).clamp_(min=0)
    step = variance.div_(evidence.batch_size).add_(signal).sqrt_()
    return signal.div_(step).nan_to_num_(nan=0.0)  # 0 / 0 where an entry has no gradient at all


@register_score("gradient", needs=(MEAN_GRADIENT,))
def gradient(evidence: Evidence) -> Tensor:
    """|g|, as in SPEFT (arXiv 2412.13488)."""
    return evidence.mean_gradient.abs()


@register_score("sensitivity", needs=(MEAN_GRADIENT,))
def sensitivity(evidence: Evidence) -> Tensor:
    """|w g|, the first-order change of the loss when the entry is set to zero (SNIP, arXiv 1810.02340)."""
    return (evidence.weight.to(evidence.mean_gradient) * evidence.mean_gradient).abs_()


@register_score("magnitude")
def magnitude(evidence: Evidence) -> Tensor:
    """|w|."""
    return evidence.weight.float().abs()


@register_score("random")
def random(evidence: Evidence) -> Tensor:
    """Uniform in [0, 1)."""
    import torch

    return torch.rand(evidence.weight.shape, generator=evidence.generator).to(evidence.weight.device)


def _fisher(evidence: Evidence) -> Tensor:
    return evidence.mean_square


for _name, _type in {"fisher": "empirical", "fisher_sampled": "sampled", "fisher_expected": "expected"}.items():
    register_score(_name, needs=(MEAN_SQUARE,), fisher_type=_type)(_fisher)
