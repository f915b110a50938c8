"""The diagonal Fisher information of every trainable tensor, exact per example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fish_tuning.scores.loss_vectors import LossFunction
from fish_tuning.scores.losses import FisherType, TokenReduction
from fish_tuning.scores.moments import measure_moments


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
    rows_per_example: int = 1,
    seed: int = 0,
    scores_dtype: torch.dtype = torch.float32,
    scores_device: torch.device | str | None = None,
    warmup_steps: int | None = None,
    split_between_processes: bool | Literal["already"] = True,
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
            the model is off meanwhile, one that you open around the call counts. DDP, DataParallel, `torch.compile`,
            and DeepSpeed's engine are looked through. A model that FSDP or DeepSpeed ZeRO-3 has sharded is scored by
            all processes together, as one that is whole; under FSDP1 each then holds all of it for that time.
        calibration_dataloader: gives mappings of tensors with `labels`, as transformers' collators do; any batch size.
            What else they hold is left out, with a warning where the forward pass takes it.
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
            each example's loss from that example alone. It gets the whole batch, the model only what its forward pass
            takes by name. Only with fisher_type="empirical".
        rows_per_example: for a `loss_fn` over groups of rows (a preferred and a rejected answer, an anchor and its
            match): how many neighbouring rows of the batch are one example. `loss_fn` gets all rows and gives a loss a
            group.
        seed: of the drawn labels.
        scores_dtype: in which the scores are summed and returned: float32, float64 or bfloat16. With bfloat16 they take
            half the memory. Each layer's squares are computed in fp32 all the same, and sums are rounded so that none
            is lost: they are right on average, and each entry to about 1 % for 60 batches, 2 % for 500, 4 % for 4,000.
        scores_device: where they are kept, e.g. "cpu" to score all the weights of a model that fills its GPU: squares
            are added there layer by layer as the backward pass meets them. Default: with their tensors.
        warmup_steps: dense AdamW steps before scoring, undone after it to the bit: one pass over the calibration
            examples, or over the first 32 a step. Default: 20 where a part of a PEFT adapter is exactly zero, as B is
            at LoRA's usual start: all that it is multiplied with would score zero, and masks could choose among B
            alone. Else 0: the weights as they are.
        split_between_processes: where torch.distributed is initialised (torchrun, accelerate launch), each process of
            the default group scores its share of the examples and all get the same scores, those of one process. All
            must call this, with the same loader, or each with its part (accelerate's, or a DistributedSampler; what
            these give twice, so that all parts are as long, counts once). Where they drew an adapter or a head apart,
            the first one's is scored, which DDP trains; each has its own back afterwards.
            "already": each loader gives its process a part, though nothing in it tells (a data set that picks its rows
            by rank, a `datasets.Dataset` from split_dataset_by_node). What several of them give counts as often.
            False: this process scores all by itself, and the others need not call; not where the model is sharded.
        progress: show a progress bar.

    Returns:
        {name as in `model.named_parameters()`: scores of the same shape}. For a wrapped model they are the names of the
        module within, as `apply_mask` takes them.

    Raises:
        FisherError: nothing to train or to calibrate on, an unknown task, a model whose own loss is another than its
            task's (without `loss_fn`), labels that are missing, out of range or do not count, or a loss or score that
            is not finite; it names the example or the tensor.

    Warns:
        FishTuningWarning: a rule failed on this model, and the scores are exact all the same, but slower to get; the
            model adds its routers' balance to its loss, which is left out; batches hold an argument of the forward
            pass that is no tensor; or frozen weights differ between processes.

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
    moments = measure_moments(
        model,
        calibration_dataloader,
        device,
        gradients=False,
        num_samples=num_samples,
        fisher_type=fisher_type,
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
    return moments.mean_squares
