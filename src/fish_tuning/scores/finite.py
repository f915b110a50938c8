"""Scores and losses that are no numbers: what to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fish_tuning.errors import FisherError
from fish_tuning.scores.reading import read
from fish_tuning.sparse.masked_tensors import masked_tensors
from fish_tuning.sparse.sharding import local_part


def check_finite(model: nn.Module, scores: Mapping[str, Tensor]) -> None:
    """FisherError that names the first tensor whose scores are no numbers, and why."""
    sums = torch.stack(read(score.sum(dtype=torch.float32) for score in scores.values()))
    if bool(sums.isfinite().all()):
        return
    for name, score in scores.items():
        if bool(score.isfinite().all()):  # only their sum is too large
            continue
        why = "a gradient is NaN or infinite" if score.isnan().any() else (
            "a squared gradient is beyond fp32: some gradient is infinite or above 1.8e19"
        )  # fmt: skip
        raise FisherError(
            f"{int((~score.isfinite()).sum())} of {score.numel()} scores of {name!r} are not finite: {why}. "
            f"{why_not_finite(model)}"
        )


def why_not_finite(model: nn.Module) -> str:
    """A sentence on what to look at: the first tensor of the model that is not finite, if there is one."""
    for name, tensor in tensors_of(model):
        # Of a tensor that is sharded, this process's part: others may not be asking.
        tensor = local_part(tensor)
        if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.detach().isfinite().all()):
            return f"The model's tensor {name!r} holds NaN or infinite values."
    return "All of the model's own tensors are finite; check the calibration examples and the model's dtype."


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, and the whole tensors that masked ones are part of."""
    yield from ((tensor.name, tensor.frozen) for tensor in masked_tensors(model))
    yield from model.named_parameters()
    yield from model.named_buffers()
