"""A learning rate of its own for what trains as a whole beside the selected entries."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Sequence
from typing import Any, cast

from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer

from fish_tuning.errors import MaskError
from fish_tuning.sparse.masked_tensors import dense_parameters, is_masked
from fish_tuning.training.reporting import HEAD


def set_head_learning_rate(trainer: Trainer, learning_rate: float, head: Sequence[str] | None = None) -> None:
    """Have a Trainer train the head with a learning rate of its own; the schedule scales both alike.

    A few selected entries bear several times the learning rate of a dense head, which falls apart at theirs; with
    one rate for both, what is compared is the heads. The head is PEFT's `modules_to_save`; on a masked model
    without PEFT it is what the mask left dense. `FishTuningTrainer` takes the rate as `head_learning_rate`; this is
    for SFTTrainer and any other Trainer, before `train()`.

    Args:
        trainer: any Trainer that has not made its optimizer yet.
        learning_rate: above 0; `TrainingArguments.learning_rate` stays that of all else.
        head: regular expressions for the names of the head's parameters, where they are not the ones named above.

    Raises:
        MaskError: a rate that is not above 0, a Trainer whose optimizer is made already, or a model without a head.

    Example:
        >>> trainer = SFTTrainer(model=peft_model, ..., callbacks=[FishMaskCallback(mask)])  # doctest: +SKIP
        >>> set_head_learning_rate(trainer, 1e-3)  # doctest: +SKIP
    """
    check_rate(learning_rate)
    if trainer.optimizer is not None:
        raise MaskError(
            "The Trainer has its optimizer already, whose groups have their learning rates. Set the head's before "
            "training begins, or give the optimizer's own groups their rates."
        )
    check_head_learning_rate(cast(nn.Module, trainer.model), learning_rate, head)
    make, own = type(trainer).create_optimizer, weakref.ref(trainer)  # a cycle would keep the model in memory

    def create_optimizer(model: Any = None) -> Any:
        trainer: Any = own()
        new = trainer.optimizer is None
        optimizer = make(trainer, model)
        if new:
            split_off(optimizer, _head(trainer.model if model is None else model, head), learning_rate)
        return optimizer

    vars(trainer)["create_optimizer"] = create_optimizer


def check_rate(learning_rate: object) -> None:
    """MaskError for a learning rate that is none."""
    number = isinstance(learning_rate, int | float) and not isinstance(learning_rate, bool)
    if not number or not 0 < learning_rate < math.inf:  # type: ignore[operator]
        raise MaskError(f"head_learning_rate={learning_rate!r} must be a number above 0.")


def check_head_learning_rate(model: nn.Module, learning_rate: float, head: Sequence[str] | None = None) -> None:
    """MaskError for a rate that is none, or a model without a head; arguments as those of `set_head_learning_rate`."""
    check_rate(learning_rate)
    if not _head(model, head):
        raise MaskError(
            f"head_learning_rate={learning_rate:g}: {type(model).__name__} has no head, that is, nothing trainable in "
            "modules_to_save, or that its mask leaves dense. Leave the rate out, or name the head in modules_to_save."
        )


def split_off(optimizer: Optimizer, parameters: list[Tensor], learning_rate: float) -> None:
    """Give `parameters` groups of their own, with this rate and all else as in the groups that they leave.

    Only before a scheduler is made, which remembers every group's rate.
    """
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        leaving = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if len(leaving) == len(group["params"]):
            group["lr"] = learning_rate
        elif leaving:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            optimizer.add_param_group({**group, "params": leaving, "lr": learning_rate})


def _head(model: nn.Module, head: Sequence[str] | None) -> list[Tensor]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if head is not None:
        return [parameter for name, parameter in parameters.items() if any(re.search(each, name) for each in head)]
    named: list[Tensor] = [parameter for name, parameter in parameters.items() if HEAD in name]
    if named or not is_masked(model) or isinstance(model, PeftModel):
        return named
    return [parameter for parameter in dense_parameters(model).values() if parameter.requires_grad]
