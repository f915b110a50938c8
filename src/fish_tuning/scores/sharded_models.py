"""Models that an engine gathers layer by layer: what trains is whole while it is scored, all else comes as ever."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

import torch.distributed as dist
from torch import Tensor, nn

from fish_tuning.scores.bare_model import unwrapped
from fish_tuning.scores.fsdp1 import without_fsdp1
from fish_tuning.scores.fsdp2 import Fsdp2
from fish_tuning.scores.zero3 import Zero3
from fish_tuning.sparse.sharding import engine_of


class LayerByLayer(Protocol):
    """An engine that leaves each process a part of every tensor, and gathers a layer's for its passes."""

    @property
    def name(self) -> str:
        """As `engine_of` tells it."""

    def gathers(self, module: nn.Module) -> bool:
        """Whether it gathers tensors when this module is called."""

    def only_frozen(self, model: nn.Module, trained: Sequence[nn.Parameter]) -> AbstractContextManager[list[Tensor]]:
        """Until this is left, it gathers the frozen rest and looks after no other; gives whole copies of `trained`.

        All processes enter this, and do the same passes inside. FisherError where the engine cannot do so, or holds
        gradients of an unfinished step.
        """


ENGINES: tuple[LayerByLayer, ...] = (Fsdp2(), Zero3())


def gathered_layer_by_layer(model: nn.Module) -> bool:
    """Whether an engine has left each process a part of the model, or of a module of it."""
    return _engine(model) is not None


def is_gathered(module: nn.Module) -> bool:
    """Whether calling this module gathers tensors, which cannot be within a backward pass: others may not be there."""
    return any(engine.gathers(module) for engine in ENGINES)


@contextmanager
def whole_trained_tensors(model: nn.Module) -> Iterator[nn.Module]:
    """The bare model, every tensor that trains whole and an ordinary parameter, on every process, until this is left.

    Under FSDP1 all tensors are. Another engine is not told of those that train: it gathers the frozen rest for each
    layer's forward and backward pass, and has no gradient to reduce; inside, all processes do the same passes. All
    processes must enter this. A model that no engine has split is left alone.

    Raises FisherError where the engine cannot do so, or holds gradients of an unfinished step.
    """
    with ExitStack() as stack:
        model = unwrapped(stack.enter_context(without_fsdp1(model)))
        engine = _engine(model)
        if engine is None:
            yield model
            return
        slots = _slots_of_trained(model, engine.name)
        copies = stack.enter_context(engine.only_frozen(model, list(slots)))
        for (parameter, places), copy in zip(slots.items(), copies, strict=True):
            ordinary = nn.Parameter(copy)
            for module, name in places:
                stack.callback(module._parameters.__setitem__, name, parameter)
                module._parameters[name] = ordinary
        yield model


def _engine(model: nn.Module) -> LayerByLayer | None:
    if not (dist.is_available() and dist.is_initialized()):  # without processes there is nothing to gather
        return None
    return next((engine for engine in ENGINES if engine.gathers(model)), None)


def _slots_of_trained(model: nn.Module, engine: str) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Every place of each tensor that trains and that the engine has taken."""
    slots: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and engine_of(parameter) == engine:
                slots.setdefault(parameter, []).append((module, name))
    return slots
