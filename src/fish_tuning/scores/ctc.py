"""Speech recognition: the CTC loss of each example alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fish_tuning.errors import FisherError
from fish_tuning.scores.batches import on_cpu
from fish_tuning.scores.losses import LABELS, FisherType, TokenReduction, labels_of
from fish_tuning.scores.reading import placed


def ctc_losses(
    model: Any, logits: Tensor, batch: Mapping[str, Tensor], fisher_type: FisherType, reduction: TokenReduction
) -> Tensor:
    """-log p(labels | sound), (n,), over labels from 0 on; with "mean" divided by their number.

    Raises FisherError for labels that are drawn or expected: no class is drawn for a frame.
    """
    if fisher_type != "empirical":
        raise FisherError(f"fisher_type={fisher_type!r}: CTC has no labels of frames to draw. Use 'empirical'.")
    # What says how long things are is looked at on the CPU, where the loss wants it.
    labels = labels_of({key: tensor for key in LABELS if (tensor := on_cpu(batch, key)) is not None})
    counted = labels >= 0
    frames = torch.full((len(logits),), logits.shape[1], device="cpu")
    if (mask := on_cpu(batch, "attention_mask")) is not None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        frames = base._get_feat_extract_output_lengths(mask.sum(-1)).to(torch.long)
    lengths = counted.sum(-1)
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1)
    losses = F.ctc_loss(
        log_probabilities,
        placed(labels.masked_select(counted), logits.device),
        frames,
        lengths,
        blank=model.config.pad_token_id,
        reduction="none",
        zero_infinity=model.config.ctc_zero_infinity,
    )
    return losses / placed(lengths.clamp(min=1), losses.device) if reduction == "mean" else losses
