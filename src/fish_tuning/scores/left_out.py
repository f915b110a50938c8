"""What batches hold for the model, but not as tensors: it is not passed on, which is told."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

# What changes no loss, and which scoring decides itself.
_OF_NO_CONSEQUENCE = ("use_cache", "return_dict", "return_loss")


class LeftOut:
    """Notes, of batches that pass, what the forward pass takes and would get no more.

    Columns that it does not take (texts, ids of documents) are nobody's loss, nor is an argument's own default. What
    has `**kwargs` takes all of them, but for models of transformers, whose own are options of theirs.
    """

    def __init__(self, model: Any) -> None:
        base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
        parameters = inspect.signature(base.forward).parameters
        self._takes_all = not hasattr(base, "main_input_name") and any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
        )
        self._defaults = {
            name: parameter.default
            for name, parameter in parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
        self._new: dict[str, str] = {}
        self._told: set[str] = set()

    def noted(self, batches: Iterable[Any]) -> Iterator[Any]:
        for raw in batches:
            if isinstance(raw, Mapping):
                self._new |= {key: type(value).__name__ for key, value in raw.items() if self._counts(key, value)}
            yield raw

    def _counts(self, key: str, value: object) -> bool:
        if isinstance(value, Tensor) or value is None or key in _OF_NO_CONSEQUENCE:
            return False
        if key not in self._defaults:
            return self._takes_all
        return not (isinstance(value, bool | int | float | str) and value == self._defaults[key])

    def new(self) -> list[str]:
        """What to tell the user since the last call."""
        found = {key: kind for key, kind in self._new.items() if key not in self._told}
        self._told |= found.keys()
        self._new = {}
        if not found:
            return []
        listed = ", ".join(f"{key!r} ({kind})" for key, kind in found.items())
        return [
            f"Fisher information: the calibration batches hold {listed}, which the model's forward pass takes, but not "
            "as tensors: the model is scored without. Make them tensors (torch.tensor(value) is one for all of a "
            "batch), or leave out of the batches what is none of the model's."
        ]
