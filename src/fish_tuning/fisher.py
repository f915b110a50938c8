"""The diagonal Fisher information of every trainable tensor, exact per example."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fish_tuning.batches import Batch, batch_size, calibration_batches, most_padded_row, rows, trim_padding
from fish_tuning.errors import FisherError
from fish_tuning.losses import (
    FisherType,
    Likelihood,
    TokenReduction,
    align_labels,
    example_losses,
    labels_of,
    resolve_likelihood,
)
from fish_tuning.probes import Checksums, Probes, Scores, checksum
from fish_tuning.scoring_state import scoring_state
from fish_tuning.sparse import is_masked

logger = logging.getLogger(__name__)

LossFunction = Callable[[Any, Mapping[str, Tensor]], Tensor]

# A layer rule is trusted for a tensor when it agrees with the plain gradient of one example this well. Wrong rules are
# wrong by the order of the gradient itself; rounding is far below, except where a gradient is all rounding.
RULE_TOLERANCE = 1e-3
LOW_PRECISION_TOLERANCE = 0.1
NEGLIGIBLE_GRADIENT = 1e-4  # of the norm over all tensors
CHECKED_BATCHES = 4  # in which a tensor may wait for an example that gives it a gradient
_NO_GRADIENT = torch.zeros(2, dtype=torch.float64)


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
        progress: show a progress bar.

    Returns:
        {name as in `model.named_parameters()`: fp32 scores of the same shape and device}.

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
    _check_arguments(model, fisher_type, token_reduction, method, loss_fn, num_samples)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise FisherError("The model has no trainable tensor (requires_grad=True); there is nothing to score.")
    if is_masked(model):
        raise FisherError(
            "The model has a mask applied; its tensors cannot be scored as a whole. Call remove_mask(model) first."
        )
    target = torch.device(device) if device is not None else next(iter(trainable.values())).device
    if device is not None and not hasattr(model, "hf_device_map"):
        model.to(target)

    losses = _LossVectors(model, fisher_type, token_reduction, loss_fn, seed)
    scorer = _Scorer(model, trainable, losses, method)
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


class _LossVectors:
    """From a batch to the loss vectors whose squared per-example gradients are summed."""

    def __init__(
        self,
        model: nn.Module,
        fisher_type: FisherType,
        token_reduction: TokenReduction,
        loss_fn: LossFunction | None,
        seed: int,
    ) -> None:
        self.model, self.fisher_type, self.token_reduction = model, fisher_type, token_reduction
        self.loss_fn, self.seed = loss_fn, seed
        self.likelihood: Likelihood | None = None
        self.encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.takes_positions = "position_ids" in _forward_parameters(model) and not _numbers_positions(model)

    def __call__(self, batch: Batch, first_example: int) -> list[Tensor]:
        """Forward pass and losses; `first_example` numbers the first row, which seeds its drawn labels."""
        inputs = batch if self.encoder_decoder or self.loss_fn else _without_labels(batch)
        outputs = self.model(**inputs, **self._positions(batch))
        losses = self._losses(outputs, batch, first_example)
        for offset, finite in enumerate(torch.stack(losses).isfinite().all(dim=0).tolist()):
            if not finite:
                raise FisherError(
                    f"The loss of calibration example {first_example + offset} is not finite, so neither is its Fisher "
                    "information. Check the example and the model's dtype."
                )
        return losses

    def trimmed(self, batch: Batch) -> Batch:
        """Without common padding, where the task is known well enough to tell what runs along the tokens."""
        return batch if self.encoder_decoder or self.loss_fn else trim_padding(batch)

    def _losses(self, outputs: Any, batch: Batch, first_example: int) -> list[Tensor]:
        if self.loss_fn is not None:
            loss = self.loss_fn(outputs, batch)
            if loss.shape != (batch_size(batch),):
                raise FisherError(
                    f"loss_fn must return one loss an example, shape ({batch_size(batch)},); it returned "
                    f"{tuple(loss.shape)}."
                )
            return [loss]
        logits = outputs.logits
        labels = align_labels(self.model, logits, labels_of(batch), batch.get("attention_mask"))
        if self.likelihood is None:
            self.likelihood = resolve_likelihood(self.model, logits, labels, self.token_reduction)
        # A generator for each example makes its draw independent of the batch it is in.
        generators = [
            torch.Generator().manual_seed(self.seed + (1 + first_example + row) * 2**20)
            for row in range(len(logits) if self.fisher_type == "sampled" else 0)
        ]
        return example_losses(logits, labels, self.likelihood, self.fisher_type, generators)

    def _positions(self, batch: Batch) -> Batch:
        """Positions counted from the first real token where padding comes first: a row's loss must not depend on it."""
        mask = batch.get("attention_mask")
        if mask is None or mask.dim() != 2 or "position_ids" in batch or not self.takes_positions:
            return {}
        if bool((mask[:, 1:] >= mask[:, :-1]).all()) and not bool(mask.all()):
            return {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}
        return {}


class _Scorer:
    """Adds batches up into `scores`, tensor by tensor by rule or by loop."""

    def __init__(self, model: nn.Module, trainable: dict[str, nn.Parameter], losses: _LossVectors, method: str) -> None:
        self.trainable, self.losses = trainable, losses
        self.scores = _zeros(trainable)
        self.probes = Probes(model, trainable if method == "auto" else ())
        self.reasons = dict.fromkeys(
            trainable.keys() - set(self.probes.names), "no rule" if method == "auto" else "method='loop'"
        )
        # How far each rule is proven: 1 with single examples, 2 with several, where a layer that does not keep examples
        # apart shows. An example that gives a tensor no gradient proves nothing, so others are tried.
        self.proven = dict.fromkeys(self.probes.names, 0)
        self.checks = Counter[int]()
        self.begun = False
        self.gradient_scale = 0.0  # squared norm of an example's gradient, the largest seen

    def add(self, batch: Batch, first_example: int) -> None:
        level = min(batch_size(batch), 2)
        unproven = [name for name in self.probes.names if self.proven[name] < level]
        if unproven and self.checks[level] < CHECKED_BATCHES:
            self.checks[level] += 1
            self._add_checked(batch, first_example, unproven, level)
        elif self.probes.names:
            self._batched(batch, first_example, self.scores)
        if self.probes.broken:
            name, reason = next(iter(self.probes.broken.items()))
            raise FisherError(
                f"The layer of {name!r} is called differently from batch to batch: {reason}. Use method='loop'."
            )
        if not self.begun:
            self._log_choice()
        looped = [name for name in self.trainable if name in self.reasons]
        if looped:
            self._loop(batch, first_example, looped, self.scores)
        self.begun = True

    def _add_checked(self, batch: Batch, first_example: int, names: list[str], level: int) -> None:
        """Adds the batch by rule, but keeps of `names` only those whose rule agrees with the loop on one example."""
        row = most_padded_row(batch)  # if anything spills between examples, it shows there
        before = {name: self.scores[name].clone() if self.begun else None for name in names}
        by_rule: Checksums = {}
        self._batched(batch, first_example, self.scores, by_rule, row)
        by_loop = dict.fromkeys(names, _NO_GRADIENT)
        for name, squares in self._squared_gradients(rows(batch, row, row + 1), first_example + row, names):
            by_loop[name] = by_loop[name] + checksum(squares)
        wrong = self._disagreements(by_rule, by_loop, level)
        wrong |= {name: self.probes.broken.pop(name) for name in names if name in self.probes.broken}
        for name in wrong:
            earlier = before[name]
            self.scores[name].zero_() if earlier is None else self.scores[name].copy_(earlier)
        self.probes.release(wrong)
        self.reasons |= wrong
        if wrong and self.begun:
            self._log_choice()

    def _disagreements(self, by_rule: Checksums, by_loop: Checksums, level: int) -> dict[str, str]:
        """Tensors whose rule does not give what the loop gives on one example; those that do are proven."""
        rule = torch.stack([by_rule.get(name, _NO_GRADIENT) for name in by_loop])
        loop = torch.stack(list(by_loop.values()))
        self.gradient_scale = max(self.gradient_scale, float(loop[:, 0].sum()))
        floor = NEGLIGIBLE_GRADIENT**2 * self.gradient_scale
        agrees = ((rule - loop).abs() <= 2 * self._tolerance() * loop[:, :1].clamp(min=floor)).all(dim=1).tolist()
        tells = (loop[:, 0] > floor).tolist()
        self.proven |= {name: level for name, ok, tell in zip(by_loop, agrees, tells, strict=True) if ok and tell}
        return {
            name: "its rule does not agree with the plain gradient"
            for name, ok in zip(by_loop, agrees, strict=True)
            if not ok
        }

    def _tolerance(self) -> float:
        low = torch.is_autocast_enabled(self._device().type) or any(
            parameter.dtype not in (torch.float32, torch.float64) for parameter in self.losses.model.parameters()
        )
        return LOW_PRECISION_TOLERANCE if low else RULE_TOLERANCE

    def _batched(
        self, batch: Batch, first_example: int, into: Scores, checksums: Checksums | None = None, row: int = 0
    ) -> None:
        self.probes.start(batch_size(batch), self._device())
        losses = self.losses(batch, first_example)
        self.probes.backward(losses, into, checksums, row)

    def _loop(self, batch: Batch, first_example: int, names: list[str], into: Scores) -> None:
        """The definition: one example at a time, without its padding, its gradient squared."""
        for row in range(batch_size(batch)):
            for name, squares in self._squared_gradients(rows(batch, row, row + 1), first_example + row, names):
                into[name] += squares

    def _squared_gradients(self, example: Batch, number: int, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """The squared gradients of one example, fp32, once for each of its loss vectors."""
        parameters = [self.trainable[name] for name in names]
        losses = self.losses(self.losses.trimmed(example), number)
        for vector, loss in enumerate(losses, start=1):
            gradients = torch.autograd.grad(
                loss.sum(), parameters, allow_unused=True, retain_graph=vector < len(losses)
            )
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    yield name, gradient.float().square()

    def _device(self) -> torch.device:
        return next(iter(self.scores.values())).device

    def _log_choice(self) -> None:
        logger.info("Fisher information: %d tensors by batched rules.", len(self.probes.names))
        for reason, number in Counter(self.reasons.values()).items():
            example = next(name for name, why in self.reasons.items() if why == reason)
            logger.info("Fisher information: %d tensors by the loop (%s), e.g. %s.", number, reason, example)


def _zeros(tensors: Mapping[str, Tensor]) -> Scores:
    return {
        name: torch.zeros_like(tensor, dtype=torch.float32, requires_grad=False) for name, tensor in tensors.items()
    }


def _without_labels(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key not in ("labels", "label")}


def _forward_parameters(model: Any) -> set[str]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(base.forward).parameters)


def _numbers_positions(model: nn.Module) -> bool:
    """Whether the model numbers the tokens itself, skipping padding, as RoBERTa and its kin do (not from 0)."""
    return any(
        name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        for name, module in model.named_modules()
    )


def _check_arguments(
    model: nn.Module,
    fisher_type: str,
    token_reduction: str,
    method: str,
    loss_fn: LossFunction | None,
    num_samples: int | None,
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
    if loss_fn is not None and fisher_type != "empirical":
        raise FisherError(f"loss_fn gives losses for the given labels, so fisher_type={fisher_type!r} cannot use it.")
    if num_samples is not None and num_samples < 1:
        raise FisherError(f"num_samples={num_samples} must be at least 1, or None for the whole loader.")
