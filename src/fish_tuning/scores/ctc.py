"""Speech recognition: the CTC loss of each example alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fish_tuning.errors import FisherError
from fish_tuning.scores.losses import FisherType, TokenReduction, labels_of


def ctc_losses(
    model: Any, logits: Tensor, batch: Mapping[str, Tensor], fisher_type: FisherType, reduction: TokenReduction
) -> Tensor:
    """-log p(labels | sound), (n,), over labels from 0 on; with "mean" divided by their number.

    Raises FisherError for labels that are drawn or expected: no class is drawn for a frame.
    """
    if fisher_type != "empirical":
        raise FisherError(f"fisher_type={fisher_type!r}: CTC has no labels of frames to draw. Use 'empirical'.")
    labels = labels_of(batch)
    counted = labels >= 0
    frames = torch.full((len(logits),), logits.shape[1], device=logits.device)
    if (mask := batch.get("attention_mask")) is not None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        frames = base._get_feat_extract_output_lengths(mask.sum(-1)).to(torch.long)
    lengths = counted.sum(-1)
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1)
    losses = F.ctc_loss(
        log_probabilities,
        labels.masked_select(counted),
        frames,
        lengths,
        blank=model.config.pad_token_id,
        reduction="none",
        zero_infinity=model.config.ctc_zero_infinity,
    )
    return losses / lengths.clamp(min=1) if reduction == "mean" else losses
