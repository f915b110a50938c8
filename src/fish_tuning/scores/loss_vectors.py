"""From a model and a batch to the loss vectors whose per-example gradients are squared."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.errors import FisherError, out_of_memory
from fish_tuning.model_walks import attribute, every_module
from fish_tuning.scores.batches import Batch, batch_size, changed, on_cpu, trim_padding
from fish_tuning.scores.ctc import ctc_losses
from fish_tuning.scores.finite import why_not_finite
from fish_tuning.scores.labels import (
    by_example,
    check_given_classes,
    check_labels,
    check_shapes,
    logits_of,
    whole_numbers,
)
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
from fish_tuning.scores.mixed_precision import Autocast
from fish_tuning.scores.own_loss import OwnLoss
from fish_tuning.scores.reading import read
from fish_tuning.scores.sharded_models import gathered_layer_by_layer

LossFunction = Callable[[Any, Mapping[str, Tensor]], Tensor]
UNREAD = 32  # batches whose losses are looked at in one go
AS_IT_IS = nullcontext()


class LossVectors:
    """From a batch to the loss vectors whose squared per-example gradients are summed.

    Whether the losses are finite is noted beside them and read later, since a look at each batch's would have a GPU
    wait for the next: whoever uses them calls `check_finite` before anything of it is given away.
    """

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
        self.autocast = Autocast(model)
        self.loss_fn, self.seed = loss_fn, seed
        self.own = OwnLoss(model)
        self.likelihood: Likelihood | None = None
        self.in_forward = False  # whether the model was being called when an error came
        self._finite: list[tuple[int, Tensor]] = []  # the number of an example, and of it and those behind it whether
        self.encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.takes = _named_inputs(model) if loss_fn else None
        self.takes_positions = "position_ids" in _forward_parameters(model) and not _numbers_positions(model)

    def __call__(
        self, batch: Batch, first_example: int, in_place: AbstractContextManager[None] = AS_IT_IS
    ) -> list[Tensor]:
        """Forward pass and losses; `first_example` numbers the first row, which seeds its drawn labels.

        `in_place` is entered for the forward pass: it puts other tensors where the model's parameters are.
        """
        if self.rows_per_example > 1:
            batch = changed(batch, lambda key, value: value.flatten(0, 1) if value.dim() else value)
        inputs = batch if self.encoder_decoder or self.loss_fn else _without_labels(batch)
        if self.takes is not None:  # what is there for loss_fn alone
            inputs = {key: value for key, value in inputs.items() if key in self.takes}
        inputs = {**inputs, **self._positions(batch)}
        drawn = self.fisher_type != "empirical"
        asked = {} if self.loss_fn else self.own.labels_to_give(batch, drawn)
        if (self.encoder_decoder and not self.loss_fn) or (asked and not drawn):
            check_given_classes(self.model, on_cpu(batch, "labels"), first_example)
        failed: Exception | None = None
        with self.autocast.on():
            self.in_forward = True
            with in_place:
                try:
                    outputs = self._outputs({**inputs, **asked})
                except Exception as error:
                    if not asked or out_of_memory(error) or gathered_layer_by_layer(self.model):
                        raise
                    # Labels that do not fit are told by name, below, after a pass without them; what was not of the
                    # labels is raised as it came.
                    outputs = self._outputs(inputs)
                    if not self._fails_again({**inputs, **asked}, error):
                        raise
                    asked, failed = {}, error
            self.in_forward = False
            losses = self._losses(outputs, batch, first_example, given=None if failed else asked or batch)
        if failed is not None:
            raise self.own.failed(failed) from failed
        self._finite.append((first_example, torch.stack(losses).detach().isfinite().all(dim=0)))
        return losses

    def of_given_labels(self) -> LossVectors:
        """Those of the labels that the data has, which warm-up trains on, whatever labels are scored."""
        other = copy.copy(self)
        other.fisher_type, other.likelihood, other._finite = "empirical", None, []
        return other

    def check_finite(self, unread: int = 1) -> None:
        """FisherError that names the first example whose loss is not finite, where so many batches are unread."""
        if len(self._finite) >= unread and (example := self.first_not_finite()) is not None:
            raise self.not_finite(example)

    def first_not_finite(self) -> int | None:
        """The first example whose loss is not finite, of those that were not asked for yet."""
        noted, self._finite = self._finite, []
        for (first_example, _), finite in zip(noted, read(finite for _, finite in noted), strict=True):
            for offset, yes in enumerate(finite.tolist()):
                if not yes:
                    return first_example + offset
        return None

    def not_finite(self, example: int) -> FisherError:
        return FisherError(
            f"The loss of calibration example {example} is not finite, so neither is its Fisher information. "
            f"{why_not_finite(self.model)}"
        )

    def trimmed(self, batch: Batch) -> Batch:
        """Without common padding, where the task is known well enough to tell what runs along the tokens."""
        known = not self.encoder_decoder and not self.loss_fn and not any(key in batch for key in ANSWER)
        return trim_padding(batch) if known else batch

    def _losses(self, outputs: Any, batch: Batch, first_example: int, given: Batch | None) -> list[Tensor]:
        """`given`: what the model could compute its own loss of."""
        if self.loss_fn is not None:
            loss = self.loss_fn(outputs, changed(batch, lambda key, value: _to_change(value)))
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            examples = batch_size(batch) // self.rows_per_example
            if shape != (examples,):
                raise FisherError(
                    "loss_fn must return one loss an example, shape (n,) for a batch of n; for "
                    f"{examples} examples it returned {shape}."
                )
            return [loss if loss.dtype == torch.float64 else loss.float()]
        drawn = self.fisher_type != "empirical"
        if loss_type_of(self.model) == "ForCTC":
            if given is not None:
                self.own.look(outputs, logits_of(outputs), given, drawn)
            return [ctc_losses(self.model, logits_of(outputs), batch, self.fisher_type, self.token_reduction)]
        logits, labels = logits_of(outputs), whole_numbers(labels_of(batch))
        logits = by_example(self.model, logits, batch_size(batch))
        check_shapes(self.model, logits, labels)
        if given is not None:
            self.own.look(outputs, logits, given, drawn)
        labels = align_labels(self.model, logits, labels, batch.get("attention_mask"), self.own.shifted)
        known = labels if labels.device.type == "cpu" else self._known(logits, batch)
        if self.likelihood is None:
            self.likelihood = resolve_likelihood(self.model, logits, labels, self.token_reduction)
        check_labels(logits, known, self.likelihood, first_example, drawn)
        # A generator for each example makes its draw independent of the batch it is in.
        generators = [
            torch.Generator().manual_seed(self.seed + (1 + first_example + row) * 2**20)
            for row in range(len(logits) if self.fisher_type == "sampled" else 0)
        ]
        return example_losses(logits, labels, self.likelihood, self.fisher_type, generators, known)

    def _known(self, logits: Tensor, batch: Batch) -> Tensor:
        """The aligned labels on the CPU."""
        given = {key: tensor for key in LABELS if (tensor := on_cpu(batch, key)) is not None}
        labels = whole_numbers(labels_of(given))
        return align_labels(self.model, logits, labels, on_cpu(batch, "attention_mask"), self.own.shifted)

    def _outputs(self, inputs: Mapping[str, Tensor]) -> Any:
        """Of copies, which the forward pass may change in place: the same batch is passed again, and as rows."""
        return self.model(**{key: _to_change(value) for key, value in inputs.items()})

    def _fails_again(self, inputs: Mapping[str, Any], error: Exception) -> bool:
        try:
            self._outputs(inputs)
        except Exception as again:
            return type(again) is type(error)
        return False

    def _positions(self, batch: Batch) -> Batch:
        """Positions counted from the first real token where padding comes first: a row's loss must not depend on it."""
        mask = batch.get("attention_mask")
        if mask is None or mask.dim() != 2 or "position_ids" in batch or not self.takes_positions:
            return {}
        known = on_cpu(batch, "attention_mask")
        if known is None or not bool(((known[:, 0] == 0) & known.any(dim=1)).any()):
            return {}
        before = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
        # Whatever other rows of the batch look like: what one row has proven holds for its kind in others.
        return {"position_ids": (torch.arange(mask.shape[1], device=mask.device) - before).clamp(min=0)}


def _to_change(tensor: Tensor) -> Tensor:
    """A copy; not of what loss_fn may ask for the gradient of, which must be what the model was given."""
    return tensor if tensor.requires_grad else tensor.clone()


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
        name.endswith("position_embeddings") and child is not None and attribute(child, "padding_idx") is not None
        for module in every_module(model)
        for name, child in module._modules.items()
    )
