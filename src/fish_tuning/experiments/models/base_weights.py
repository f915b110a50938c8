"""The base model's own weights in the place of an adapter: the pool of the method `base`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from fish_tuning.peft_methods import BASE

_SETTINGS = "_fish_tuning_base_weights"  # attribute of a model that trains weights of its own


@dataclass
class BaseWeights:
    """Whose parameters train, in the terms of PEFT's configurations; a masked arm chooses entries among them.

    Args:
        target_modules: names, endings of names, or a regular expression, as PEFT takes them; `all-linear` is every
            linear layer outside `modules_to_save`.
        exclude_modules: of these, the ones to leave out.
        layers_to_transform, layers_pattern: the layers to keep to.
        modules_to_save: the task's head and whatever else trains as a whole, outside the pool.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train_base_weights(model: nn.Module, settings: BaseWeights) -> nn.Module:
    """Have the parameters that `settings` name train, and no other; the model is changed in place.

    Raises ValueError where they name none, or leave nothing frozen.
    """
    heads = head_patterns(settings.modules_to_save or ())
    targets = {name for name, module in model.named_modules() if name and _is_target(settings, name, module)}
    pool = {
        id(parameter)
        for name in targets
        for parameter in model.get_submodule(name).parameters()
        if parameter.is_floating_point()
    }
    found = False
    for name, parameter in model.named_parameters():
        in_head = any(re.search(head, name) for head in heads)
        found |= id(parameter) in pool and not in_head
        parameter.requires_grad_(in_head or id(parameter) in pool)
    if not found:
        raise ValueError("no parameter of it, outside modules_to_save, belongs to the target modules")
    if all(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the target modules hold all of its parameters; leave some out, such as the embeddings")
    vars(model)[_SETTINGS] = settings
    return model


def _is_target(settings: BaseWeights, name: str, module: nn.Module) -> bool:
    if settings.target_modules == "all-linear":
        return isinstance(module, nn.Linear | Conv1D)
    return bool(check_target_module_exists(settings, name))


def head_patterns(modules: Sequence[str]) -> list[str]:
    """Regular expressions for the parameters of modules, which may be named by the end of their names."""
    return [rf"(^|\.){re.escape(module)}\." for module in modules]


def settings_of(model: Any) -> Any:
    """What an arm's model was made with: the configuration of its PEFT adapter, or of its own weights that train."""
    own = vars(model).get(_SETTINGS)
    return model.peft_config["default"] if own is None else own


def own_head(method: str, settings: Mapping[str, Any]) -> list[str] | None:
    """Patterns for what trains outside the pool of an arm without PEFT, which would mark it; None for other methods."""
    return head_patterns(settings["modules_to_save"] or ()) if method == BASE else None
