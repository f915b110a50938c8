"""A model's modules and tensors, each once, for who asks for no names.

torch's own walks are generators within generators, of which a call that scores a few examples would make two dozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T", bound=Tensor)

_walked: ContextVar[tuple[nn.Module, list[nn.Module]] | None] = ContextVar("_walked", default=None)


@contextmanager
def walked_once(model: nn.Module) -> Iterator[None]:
    """Until this is left, one walk serves all who ask for the model's modules, which nothing in it may change."""
    token = _walked.set((model, every_module(model)))
    try:
        yield
    finally:
        _walked.reset(token)


def every_module(model: nn.Module) -> list[nn.Module]:
    """`model.modules()`, in its order."""
    walked = _walked.get()
    if walked is not None and walked[0] is model:
        return list(walked[1])
    seen: dict[nn.Module, None] = {}
    left: list[nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is not None and module not in seen:
            seen[module] = None
            if module._modules:
                left.extend(reversed(module._modules.values()))
    return list(seen)


def in_one_memory(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Each of these tensors that shares entries with another one, with the names of all that do.

    Tensors side by side in one memory, such as FSDP's, share none. What has no memory of its own, or leaves gaps in it,
    is left out.
    """
    spans: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter) or not tensor.numel():
            continue
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        start, memory = tensor.data_ptr(), (str(tensor.device), tensor.untyped_storage().data_ptr())
        if start and last + 1 == tensor.numel():  # an engine may have given its memory up
            spans.setdefault(memory, []).append((start, start + tensor.nbytes, name))
    found: dict[str, list[str]] = {}
    for each in spans.values():
        together: list[str] = []
        end = 0
        for start, stop, name in sorted(each):
            together = [*together, name] if start < end else [name]
            end = max(end, stop) if len(together) > 1 else stop
            if len(together) > 1:
                found |= dict.fromkeys(together, together)
    return found


def every_parameter(model: nn.Module) -> list[nn.Parameter]:
    """`model.parameters()`, in its order."""
    return _once(each for module in every_module(model) for each in module._parameters.values())


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """`dict(model.named_parameters())`, in its order."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    left: list[tuple[str, nn.Module | None]] = [("", model)]
    while left:
        prefix, module = left.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found[prefix + name] = parameter
        if module._modules:
            left.extend([(f"{prefix}{name}.", child) for name, child in reversed(module._modules.items())])
    return found


def attribute(module: nn.Module, name: str) -> Any:
    """Its own or its class's, else None. A module's `getattr` looks in all its dictionaries, and raises, in Python."""
    return vars(module).get(name, getattr(type(module), name, None))


def every_tensor(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return _once(
        each
        for module in every_module(model)
        for held in (module._parameters, module._buffers)
        for each in held.values()
    )


def _once(tensors: Iterable[T | None]) -> list[T]:
    found = {id(each): each for each in tensors}
    return [each for each in found.values() if each is not None]
