"""From a model and a batch to the loss vectors whose per-example gradients are squared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fish_tuning.errors import FisherError
from fish_tuning.scores.batches import Batch, batch_size, trim_padding
from fish_tuning.scores.ctc import ctc_losses
from fish_tuning.scores.finite import why_not_finite
from fish_tuning.scores.labels import check_given_classes, check_labels, check_shapes, logits_of, whole_numbers
from fish_tuning.scores.losses import (
    ANSWER,
    LABELS,
    FisherType,
    Likelihood,
    TokenReduction,
    align_labels,
    example_losses,
    labels_of,
    loss_type_of,
    resolve_likelihood,
)

LossFunction = Callable[[Any, Mapping[str, Tensor]], Tensor]


class LossVectors:
    """From a batch to the loss vectors whose squared per-example gradients are summed."""

    def __init__(
        self,
        model: nn.Module,
        fisher_type: FisherType,
        token_reduction: TokenReduction,
        loss_fn: LossFunction | None,
        seed: int,
        rows_per_example: int = 1,
    ) -> None:
        self.rows_per_example = rows_per_example
        self.model, self.fisher_type, self.token_reduction = model, fisher_type, token_reduction
        self.loss_fn, self.seed = loss_fn, seed
        self.likelihood: Likelihood | None = None
        self.encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.takes = _named_inputs(model) if loss_fn else None
        self.takes_positions = "position_ids" in _forward_parameters(model) and not _numbers_positions(model)

    def __call__(self, batch: Batch, first_example: int, parameters: dict[str, Tensor] | None = None) -> list[Tensor]:
        """Forward pass and losses; `first_example` numbers the first row, which seeds its drawn labels.

        `parameters` stand in for the model's own, each under every name that a module has it by.
        """
        if self.rows_per_example > 1:
            batch = {key: value.flatten(0, 1) if value.dim() else value for key, value in batch.items()}
        inputs = batch if self.encoder_decoder or self.loss_fn else _without_labels(batch)
        if self.takes is not None:  # what is there for loss_fn alone
            inputs = {key: value for key, value in inputs.items() if key in self.takes}
        inputs = {**inputs, **self._positions(batch)}
        if self.encoder_decoder and not self.loss_fn:
            check_given_classes(self.model, batch.get("labels"), first_example)
        outputs = self._call(parameters, inputs) if parameters else self.model(**inputs)
        losses = self._losses(outputs, batch, first_example)
        for offset, finite in enumerate(torch.stack(losses).isfinite().all(dim=0).tolist()):
            if not finite:
                raise FisherError(
                    f"The loss of calibration example {first_example + offset} is not finite, so neither is its Fisher "
                    f"information. {why_not_finite(self.model)}"
                )
        return losses

    def _call(self, parameters: dict[str, Tensor], inputs: Batch) -> Any:
        # torch's own search for tied weights would restore a module that is registered twice wrongly.
        return functional_call(self.model, parameters, (), inputs, tie_weights=False)

    def trimmed(self, batch: Batch) -> Batch:
        """Without common padding, where the task is known well enough to tell what runs along the tokens."""
        known = not self.encoder_decoder and not self.loss_fn and not any(key in batch for key in ANSWER)
        return trim_padding(batch) if known else batch

    def _losses(self, outputs: Any, batch: Batch, first_example: int) -> list[Tensor]:
        if self.loss_fn is not None:
            loss = self.loss_fn(outputs, batch)
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            examples = batch_size(batch) // self.rows_per_example
            if shape != (examples,):
                raise FisherError(
                    "loss_fn must return one loss an example, shape (n,) for a batch of n; for "
                    f"{examples} examples it returned {shape}."
                )
            return [loss if loss.dtype == torch.float64 else loss.float()]
        if loss_type_of(self.model) == "ForCTC":
            return [ctc_losses(self.model, logits_of(outputs), batch, self.fisher_type, self.token_reduction)]
        logits, labels = logits_of(outputs), whole_numbers(labels_of(batch))
        check_shapes(self.model, logits, labels)
        labels = align_labels(self.model, logits, labels, batch.get("attention_mask"))
        if self.likelihood is None:
            self.likelihood = resolve_likelihood(self.model, logits, labels, self.token_reduction)
        check_labels(logits, labels, self.likelihood, first_example, drawn=self.fisher_type != "empirical")
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


def _without_labels(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key not in LABELS}


def _forward_parameters(model: Any) -> set[str]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(base.forward).parameters)


def _named_inputs(model: Any) -> set[str] | None:
    """What the forward pass takes by name; None where it takes anything."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(base.forward).parameters.values()
    ):
        return _forward_parameters(model)
    if not hasattr(base, "main_input_name"):  # of every model of transformers
        return None
    from transformers.utils.generic import TransformersKwargs  # all that their **kwargs may hold

    return _forward_parameters(model) | set(TransformersKwargs.__annotations__)


def _numbers_positions(model: nn.Module) -> bool:
    """Whether the model numbers the tokens itself, skipping padding, as RoBERTa and its kin do (not from 0)."""
    return any(
        name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        for name, module in model.named_modules()
    )
