"""A model's modules and tensors, each once, for who asks for no names.

torch's own walks are generators within generators, of which a call that scores a few examples would make two dozen.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def every_module(model: nn.Module) -> list[nn.Module]:
    """`model.modules()`, in its order."""
    seen: dict[nn.Module, None] = {}
    left: list[nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is not None and module not in seen:
            seen[module] = None
            if module._modules:
                left.extend(reversed(module._modules.values()))
    return list(seen)


def every_parameter(model: nn.Module) -> list[nn.Parameter]:
    """`model.parameters()`, in its order."""
    found = {id(each): each for module in every_module(model) for each in module._parameters.values()}
    return [parameter for parameter in found.values() if parameter is not None]


def attribute(module: nn.Module, name: str) -> Any:
    """Its own or its class's, else None. A module's `getattr` looks in all its dictionaries, and raises, in Python."""
    return vars(module).get(name, getattr(type(module), name, None))


def every_tensor(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    buffers = [each for module in every_module(model) for each in module._buffers.values() if each is not None]
    return [*every_parameter(model), *buffers]
