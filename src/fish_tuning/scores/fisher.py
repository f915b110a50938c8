"""The diagonal Fisher information of every trainable tensor, exact per example."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fish_tuning.errors import FisherError
from fish_tuning.peft_methods import refusal
from fish_tuning.scores.batches import batch_size, calibration_batches
from fish_tuning.scores.loss_vectors import LossFunction, LossVectors
from fish_tuning.scores.losses import FisherType, TokenReduction
from fish_tuning.scores.probes import Scores
from fish_tuning.scores.scorer import Scorer
from fish_tuning.scores.scoring_state import scoring_state
from fish_tuning.sparse.masked_tensors import is_masked

logger = logging.getLogger(__name__)

SCORES_DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # float16 has no room for small squares


def calculate_fisher_information(
    model: nn.Module,
    calibration_dataloader: Iterable[Mapping[str, Any]],
    device: torch.device | str | None = None,
    *,
    num_samples: int | None = None,
    fisher_type: FisherType = "empirical",
    token_reduction: TokenReduction = "mean",
    method: Literal["auto", "loop"] = "auto",
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    scores_dtype: torch.dtype = torch.float32,
    scores_device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Diagonal Fisher information of every trainable tensor of `model`, exact per example at any batch size.

    The score of entry i is F_i = (1/N) sum_n (d loss_n / d theta_i)^2, where loss_n is the negative log-likelihood of
    example n alone (FISH-Tuning, arXiv 2504.04050, eq. 3; FISH Mask, arXiv 2111.09839, eq. 4). The square is taken per
    example, never of a batch's mean gradient. The model is scored in evaluation mode and left as it was: modes,
    `requires_grad`, `.grad`, hooks and random state; only `device` moves it.

    Args:
        model: any model whose forward pass takes the batch as keyword arguments and returns `logits`. All tensors with
            `requires_grad` are scored.
        calibration_dataloader: gives mappings of tensors with `labels`, as transformers' collators do; any batch size.
        device: where to compute. The model is moved there. Default: where its first trainable tensor is.
        num_samples: stop after that many examples. Default: all of the loader.
        fisher_type: "empirical" uses the given labels; "sampled" draws labels from the model (one draw an example,
            seeded); "expected" is the exact expectation over labels, for sequence classification (one backward pass a
            class) and regression.
        token_reduction: for token-wise tasks, whether an example's loss is the "mean" or the "sum" over its tokens.
            Padding and labels of -100 never count.
        method: "auto" squares gradients by per-layer rules in batches. Each rule is checked on your model against the
            plain gradient of one example, and whatever no rule covers goes through the loop; the log says what went
            where. "loop" forces one backward pass an example: the slow reference.
        loss_fn: `loss_fn(outputs, batch)` giving the (n,) loss of each example, for tasks not known here. It must form
            each example's loss from that example alone. Only with fisher_type="empirical".
        seed: of the drawn labels.
        scores_dtype: in which the scores are summed and returned: float32, float64 or bfloat16. With bfloat16 they take
            half the memory and about three digits; each layer's squares are computed in fp32 all the same.
        scores_device: where they are kept, e.g. "cpu" to score all the weights of a model that fills its GPU: squares
            are added there layer by layer as the backward pass meets them. Default: with their tensors.
        progress: show a progress bar.

    Returns:
        {name as in `model.named_parameters()`: scores of the same shape}.

    Raises:
        FisherError: nothing to train or to calibrate on, missing labels, an unknown task, or a loss that is not finite.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from fish_tuning import calculate_fisher_information
        >>> config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> model = BertForSequenceClassification(config)
        >>> batch = {"input_ids": torch.randint(5, 99, (4, 8)), "labels": torch.tensor([0, 1, 1, 0])}
        >>> scores = calculate_fisher_information(model, [batch], progress=False)
        >>> scores["classifier.weight"].shape
        torch.Size([2, 16])
    """
    _check_arguments(model, fisher_type, token_reduction, method, loss_fn, num_samples, scores_dtype)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise FisherError("The model has no trainable tensor (requires_grad=True); there is nothing to score.")
    if reason := refusal({type(module).__name__ for module in model.modules()}, "scored"):
        raise FisherError(reason)
    if is_masked(model):
        raise FisherError(
            "The model has a mask applied; its tensors cannot be scored as a whole. Call remove_mask(model) first."
        )
    target = torch.device(device) if device is not None else next(iter(trainable.values())).device
    if device is not None and not hasattr(model, "hf_device_map"):
        model.to(target)

    losses = LossVectors(model, fisher_type, token_reduction, loss_fn, seed)
    scorer = Scorer(model, trainable, losses, method, _zeros(trainable, scores_dtype, scores_device))
    seen = 0
    with scoring_state(model), scorer.probes, tqdm(
        total=num_samples, desc="Fisher information", unit="ex", disable=not progress, leave=False
    ) as bar:  # fmt: skip
        for batch in calibration_batches(calibration_dataloader, target, num_samples):
            scorer.add(losses.trimmed(batch), first_example=seen)
            seen += batch_size(batch)
            bar.update(batch_size(batch))
    if not seen:
        raise FisherError("The calibration dataloader gave no example.")
    if num_samples is not None and seen < num_samples:
        logger.warning("Fisher information: %d examples asked for, the loader gave %d.", num_samples, seen)
    return {name: score.div_(seen) for name, score in scorer.scores.items()}


def _zeros(tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str | None) -> Scores:
    return {
        name: torch.zeros_like(tensor, dtype=dtype, device=device, requires_grad=False)
        for name, tensor in tensors.items()
    }


def _check_arguments(
    model: nn.Module,
    fisher_type: str,
    token_reduction: str,
    method: str,
    loss_fn: LossFunction | None,
    num_samples: int | None,
    scores_dtype: torch.dtype,
) -> None:
    if not isinstance(model, nn.Module):
        raise FisherError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    for name, value, allowed in (
        ("fisher_type", fisher_type, get_args(FisherType)),
        ("token_reduction", token_reduction, get_args(TokenReduction)),
        ("method", method, ("auto", "loop")),
    ):
        if value not in allowed:
            raise FisherError(f"{name}={value!r} is not known; allowed are {', '.join(map(repr, allowed))}.")
    if scores_dtype not in SCORES_DTYPES:
        raise FisherError(
            f"scores_dtype={scores_dtype} cannot hold squared gradients, which are far below 1; allowed are "
            f"{', '.join(map(str, SCORES_DTYPES))}."
        )
    if loss_fn is not None and fisher_type != "empirical":
        raise FisherError(f"loss_fn gives losses for the given labels, so fisher_type={fisher_type!r} cannot use it.")
    if num_samples is not None and num_samples < 1:
        raise FisherError(f"num_samples={num_samples} must be at least 1, or None for the whole loader.")
