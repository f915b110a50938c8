"""The diagonal Fisher information of every trainable tensor, exact per example."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fish_tuning.errors import FisherError, FishTuningWarning
from fish_tuning.scores.bare_model import unwrapped
from fish_tuning.scores.batches import batch_size, calibration_batches
from fish_tuning.scores.finite import check_finite
from fish_tuning.scores.loss_vectors import LossFunction, LossVectors
from fish_tuning.scores.losses import FisherType, TokenReduction
from fish_tuning.scores.probes import Scores
from fish_tuning.scores.scorer import Scorer
from fish_tuning.scores.scoring_state import scoring_state
from fish_tuning.scores.validation import check_arguments, check_model, device_errors_explained

logger = logging.getLogger(__name__)


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
            `requires_grad` are scored, in the precision that the weights have: an autocast that accelerate has left in
            the model is off meanwhile, one that you open around the call counts. DDP, DataParallel, `torch.compile` and
            an FSDP that shards nothing are looked through.
        calibration_dataloader: gives mappings of tensors with `labels`, as transformers' collators do; any batch size.
        device: where to compute. The model is moved there. Default: where its first trainable tensor is.
        num_samples: stop after that many examples. Default: all of the loader.
        fisher_type: "empirical" uses the given labels; "sampled" draws labels from the model (one draw an example,
            seeded); "expected" is the exact expectation over labels, for sequence classification (one backward pass a
            class) and regression.
        token_reduction: for token-wise tasks, whether an example's loss is the "mean" or the "sum" over its tokens.
            Padding and labels of -100 never count.
        method: "auto" squares gradients by per-layer rules in batches. Each rule is checked on your model against
            plain gradients; what no rule covers, or a rule fails on, goes through the loop, and the log says what went
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
        {name as in `model.named_parameters()`: scores of the same shape}. For a wrapped model they are the names of the
        module within, as `apply_mask` takes them.

    Raises:
        FisherError: nothing to train or to calibrate on, an unknown task, labels that are missing, out of range or do
            not count, or a loss or score that is not finite; it names the example or the tensor.

    Warns:
        FishTuningWarning: a rule failed on this model. The scores are exact all the same, but slower to get.

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
    check_arguments(model, fisher_type, token_reduction, method, loss_fn, num_samples, seed, scores_dtype)
    model = unwrapped(model)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    check_model(model, trainable)
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
            with device_errors_explained(model, target):
                scorer.add(losses.trimmed(batch), first_example=seen)
            for message in scorer.new_failures():
                warnings.warn(message, FishTuningWarning, stacklevel=2)
            seen += batch_size(batch)
            bar.update(batch_size(batch))
    if not seen:
        raise FisherError("The calibration dataloader gave no example.")
    if num_samples is not None and seen < num_samples:
        logger.warning("Fisher information: %d examples asked for, the loader gave %d.", num_samples, seen)
    check_finite(model, scorer.scores)
    return {name: score.div_(seen) for name, score in scorer.scores.items()}


def _zeros(tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str | None) -> Scores:
    return {
        name: torch.zeros_like(tensor, dtype=dtype, device=device, requires_grad=False)
        for name, tensor in tensors.items()
    }
