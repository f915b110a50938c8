"""The autocast that scoring is called under, put around each forward pass as a training step has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Nothing is computed in 16 bits that is not. Where autocast is off, turning it off costs time."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


class Autocast:
    """The autocast in force where this is made, for the kinds of devices that the model is on.

    Everything else is done without it. Left on from one pass to the next it would keep its copies of the trained
    tensors in 16 bits: warm-up would go on from where it began, and the copies would pile up. The gradients of fp32
    layers would be rounded in the backward pass, too.
    """

    def __init__(self, model: nn.Module) -> None:
        first = next(model.parameters(), None)  # no model is on two kinds of accelerators
        kinds = {"cpu"} if first is None or first.is_meta else {"cpu", first.device.type}
        if torch.accelerator.is_available():  # offloaded weights are on none until they are needed
            kinds.add(torch.accelerator.current_accelerator().type)  # type: ignore[union-attr]
        self.kinds = sorted(kinds)
        self.dtypes = {kind: torch.get_autocast_dtype(kind) for kind in self.kinds if torch.is_autocast_enabled(kind)}

    @contextmanager
    def on(self) -> Iterator[None]:
        """For a forward pass."""
        with ExitStack() as stack:
            for kind, dtype in self.dtypes.items():
                stack.enter_context(torch.autocast(kind, dtype))
            if self.dtypes:
                stack.callback(torch.clear_autocast_cache)  # which torch does at the end of the outermost alone
            yield

    @contextmanager
    def off(self) -> Iterator[None]:
        """For all that is around it."""
        with ExitStack() as stack:
            for kind in self.dtypes:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
