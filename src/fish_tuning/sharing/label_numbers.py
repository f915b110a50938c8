"""How many labels an adapter's head has, where no configuration beside it tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def labels_of_head(kind: Any, config: Any, adapter: Mapping[str, Tensor]) -> int | None:
    """The number of labels in the adapter's head, where the base model's configuration has another; else None.

    Stock PEFT writes no label beside an adapter. Whoever trained a head of three classes on a base model of a thousand
    gave `num_labels=3` when loading it, and so must whoever loads the two again.

    Args:
        kind: the class that loads the base model, one of transformers' models or Auto classes.
        config: the base model's own configuration.
        adapter: the tensors of the adapter's file.
    """
    labels = getattr(config, "num_labels", None)
    if labels is None:
        return None
    is_model = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
    with torch.device("meta"):  # shapes alone
        model: Any = kind(config) if is_model else kind.from_config(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    found = set()
    for key, tensor in adapter.items():
        own = shapes.get(key.removeprefix("base_model.").removeprefix("model."))
        if own and tensor.dim() and own[0] == labels != tensor.shape[0] and own[1:] == tensor.shape[1:]:
            found.add(tensor.shape[0])
    return found.pop() if len(found) == 1 else None
