"""What a model gave and what the labels say, checked against one another before a loss is formed of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fish_tuning.errors import FisherError
from fish_tuning.scores.losses import CLASSIFICATION, IGNORED, TOKENWISE, Likelihood, loss_type_of

LOSS_FN = "pass loss_fn=f, where f(outputs, batch) returns one loss an example"


def logits_of(outputs: Any) -> Tensor:
    """The model's `logits`, of an answer's start and end side by side; FisherError that tells what there is instead."""
    if isinstance(outputs, tuple | list):
        raise FisherError(
            f"The model returned a {type(outputs).__name__} of {len(outputs)}, not outputs by name. Set "
            f"model.config.return_dict = True, or {LOSS_FN}."
        )
    named = outputs if isinstance(outputs, Mapping) else getattr(outputs, "__dict__", {})
    answer = [named.get(key) for key in ("start_logits", "end_logits")]
    if all(isinstance(part, Tensor) for part in answer):
        return torch.stack(answer, dim=1)  # type: ignore[arg-type]
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    found = f"logits that are a {type(logits).__name__}" if logits is not None else "no logits"
    raise FisherError(
        f"The model's outputs hold {found} (outputs: {', '.join(map(str, named)) or type(outputs).__name__}), so no "
        f"per-example loss is known; {LOSS_FN}."
    )


def by_example(model: Any, logits: Tensor, examples: int) -> Tensor:
    """Logits of a classification or regression as (examples, outputs); FisherError where they are not such.

    One output an example may come as (examples,), and that of one example as a scalar.
    """
    if loss_type_of(model) not in CLASSIFICATION or logits.dim() > 1:
        return logits
    if logits.numel() == examples:
        return logits.reshape(examples, 1)
    raise FisherError(
        f"The logits have shape {tuple(logits.shape)} for {examples} example{'s' * (examples > 1)}; they must be one "
        f"row an example, (examples, outputs), for one example too. Squeeze them no further, or {LOSS_FN}."
    )


def check_given_classes(model: Any, labels: Tensor | None, first_example: int) -> None:
    """For models that are given the labels in their forward pass, where a wrong one is an error of the device."""
    config, kind = getattr(model, "config", None), loss_type_of(model)
    name = "num_labels" if kind in CLASSIFICATION else "vocab_size" if kind in TOKENWISE else None
    number = getattr(config, name, None) if name else None
    if labels is not None and number and number > 1 and not labels.is_floating_point():
        _check_range(labels, number, first_example, ignored=kind in TOKENWISE)


def check_shapes(model: Any, logits: Tensor, labels: Tensor) -> None:
    """For token-wise tasks, whether labels can be laid beside the logits at all."""
    if loss_type_of(model) not in TOKENWISE:
        return
    fits = logits.dim() == 3 and labels.dim() == 2 and len(logits) == len(labels) and logits.shape[1] >= labels.shape[1]
    if not fits or labels.is_floating_point():
        raise FisherError(
            f"A token-wise task needs class numbers of shape (examples, tokens) and logits of shape (examples, tokens, "
            f"classes); there are labels {tuple(labels.shape)} of {labels.dtype} and logits {tuple(logits.shape)}. "
            f"Check the collator, or {LOSS_FN}."
        )


def check_labels(logits: Tensor, labels: Tensor, likelihood: Likelihood, first_example: int, drawn: bool) -> None:
    """Labels that are aligned to the logits: their shape, their range where they are used, and that there are any."""
    classes = logits.shape[-1]
    if likelihood.labels == "values":
        if labels.numel() != logits.numel():
            raise FisherError(
                f"The labels, of shape {tuple(labels.shape)}, are not one for each of the logits, of shape "
                f"{tuple(logits.shape)}."
            )
        return
    if likelihood.labels == "tokens":
        silent = (labels == IGNORED).all(dim=1)
        if bool(silent.any()):
            raise FisherError(
                f"Calibration example {first_example + int(silent.int().argmax())} has no label that counts: all are "
                f"{IGNORED} or at padding, so it has no loss. Leave such examples out; if a text was cut off before "
                "its answer, raise the maximal length."
            )
    elif labels.is_floating_point() or labels.numel() != len(logits):
        raise FisherError(
            f"A classification into {classes} classes needs one class number an example; the labels are "
            f"{labels.dtype} of shape {tuple(labels.shape)} for {len(logits)} examples. Labels of several classes at "
            "once must be floats."
        )
    if not drawn:
        _check_range(labels, classes, first_example, ignored=likelihood.labels == "tokens")


def _check_range(labels: Tensor, classes: int, first_example: int, ignored: bool) -> None:
    bad = (labels < 0) | (labels >= classes)
    if ignored:
        bad &= labels != IGNORED
    if not bool(bad.any()):
        return
    place = bad.nonzero()[0]
    raise FisherError(
        f"Calibration example {first_example + int(place[0])} has the label {int(labels[tuple(place)])}; allowed are 0 "
        f"to {classes - 1}{f' and {IGNORED}, which does not count' if ignored else ''}. Was the model made with the "
        "data's number of labels?"
    )


def whole_numbers(labels: Tensor) -> Tensor:
    """Class numbers in 64 bits: smaller kinds have no room for -100, nor for every class."""
    return labels if labels.is_floating_point() else labels.to(torch.int64)
