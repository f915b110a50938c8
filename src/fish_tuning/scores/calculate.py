"""Scores by name, of every trainable tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fish_tuning.devices import moved
from fish_tuning.errors import FisherError
from fish_tuning.scores.finite import why_not_finite
from fish_tuning.scores.loss_vectors import LossFunction
from fish_tuning.scores.losses import FisherType, TokenReduction
from fish_tuning.scores.moments import Moments, measure_moments
from fish_tuning.scores.named import MEAN_GRADIENT, MEAN_SQUARE, SCORES, Evidence, Score
from fish_tuning.scores.prepared import prepared
from fish_tuning.scores.reading import read
from fish_tuning.scores.sharded_models import whole_trained_tensors
from fish_tuning.scores.validation import check_arguments, check_warmup


def calculate_scores(
    model: nn.Module,
    calibration_dataloader: Iterable[Mapping[str, Any]],
    score: str = "gain",
    device: torch.device | str | None = None,
    *,
    batch_size: int = 32,
    num_samples: int | None = None,
    token_reduction: TokenReduction = "mean",
    method: Literal["auto", "loop"] = "auto",
    loss_fn: LossFunction | None = None,
    rows_per_example: int = 1,
    seed: int = 0,
    scores_dtype: torch.dtype = torch.float32,
    scores_device: torch.device | str | None = None,
    warmup_steps: int | None = None,
    split_between_processes: bool | Literal["already"] = True,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Scores of every trainable entry by a named score, from one pass over the calibration examples.

    - `gain`: g^2 / sqrt(g^2 + s^2 / b), what a step of Adam gains
    - `fisher`: F, as `calculate_fisher_information` gives it (arXiv 2504.04050, eq. 3)
    - `fisher_sampled`, `fisher_expected`: F under labels that the model draws, or expects (arXiv 2111.09839)
    - `gradient`: abs(g) (arXiv 2412.13488)
    - `sensitivity`: abs(w g) (arXiv 1810.02340)
    - `magnitude`, `random`: abs(w), chance; neither takes a pass

    g is the mean gradient over examples, F the mean of its squares, s^2 = F - g^2 the variance, b the batch size. F
    alone rewards noise: it is g^2 + s^2. `register_score` adds scores.

    Args:
        score: a registered score's name.
        batch_size: examples of one training step, which `gain` asks for: gradient accumulation and devices included.

    All other arguments are those of `calculate_fisher_information`.

    Returns:
        {name as in `model.named_parameters()`: scores of the same shape}, for `create_mask_from_fisher`.

    Raises:
        FisherError: an unknown score, scores of another shape or not finite, and as `calculate_fisher_information`.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from fish_tuning import calculate_scores
        >>> config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> batch = {"input_ids": torch.randint(5, 99, (4, 8)), "labels": torch.tensor([0, 1, 1, 0])}
        >>> scores = calculate_scores(BertForSequenceClassification(config), [batch], "gain", progress=False)
        >>> scores["classifier.weight"].shape
        torch.Size([2, 16])
    """
    chosen = SCORES.find(score, "score", FisherError)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise FisherError(f"batch_size={batch_size!r} must be a whole number of at least 1.")
    if not chosen.needs:
        check_arguments(model, chosen.fisher_type, token_reduction, method, loss_fn, num_samples, seed, scores_dtype)
        check_warmup(warmup_steps)
        moments = Moments({}, {}, 0)
    else:
        moments = measure_moments(
            model,
            calibration_dataloader,
            device,
            gradients=MEAN_GRADIENT in chosen.needs,
            num_samples=num_samples,
            fisher_type=cast(FisherType, chosen.fisher_type),
            token_reduction=token_reduction,
            method=method,
            loss_fn=loss_fn,
            rows_per_example=rows_per_example,
            seed=seed,
            scores_dtype=scores_dtype,
            scores_device=scores_device,
            warmup_steps=warmup_steps,
            split_between_processes=split_between_processes,
            progress=progress,
            stacklevel=2,
        )
    with whole_trained_tensors(model) as model:
        return _named(chosen, score, prepared(model).model, moments, batch_size, seed, scores_dtype, scores_device)


def _named(
    chosen: Score,
    name_of_score: str,
    model: nn.Module,
    moments: Moments,
    batch_size: int,
    seed: int,
    scores_dtype: torch.dtype,
    scores_device: torch.device | str | None,
) -> dict[str, Tensor]:
    scores: dict[str, Tensor] = {}
    finite: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # Taken out one at a time: scores and moments of a whole model never lie side by side.
        own = {
            need: moment.pop(name)
            for need, moment in ((MEAN_GRADIENT, moments.mean_gradients), (MEAN_SQUARE, moments.mean_squares))
            if name in moment
        }
        weight = moments.weights.pop(name, parameter.detach())
        evidence = Evidence(name, weight, own, moments.num_samples, batch_size, seed)
        found = _checked(name_of_score, chosen, evidence)
        scores[name] = found if chosen.needs else moved(found, scores_device or found.device, scores_dtype)
        finite[name] = found.isfinite().all()
    for name, yes in zip(finite, read(finite.values()), strict=True):
        if not bool(yes):
            raise _not_finite(model, name_of_score, name, scores[name])
    return scores


def _checked(name: str, score: Score, evidence: Evidence) -> Tensor:
    found = score.function(evidence)
    if not isinstance(found, Tensor) or found.shape != evidence.weight.shape:
        got = f"the shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise FisherError(
            f"score={name!r} gave {got} for {evidence.name!r}; it must give a tensor of shape "
            f"{tuple(evidence.weight.shape)}."
        )
    return found


def _not_finite(model: nn.Module, score: str, name: str, found: Tensor) -> FisherError:
    return FisherError(
        f"score={score!r}: {int((~found.isfinite()).sum())} of {found.numel()} scores of {name!r} are not finite. "
        f"{why_not_finite(model)}"
    )
