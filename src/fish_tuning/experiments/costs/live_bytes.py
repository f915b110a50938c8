"""Counts the bytes of tensors that are alive, at every moment of a computation: of real tensors and of fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

ACTIVATIONS, GRADIENTS = "activations", "gradients"


class LiveBytes(TorchDispatchMode):
    """Counts each memory that comes into being while this is entered, once, until the last tensor in it has gone.

    What kernels use inside themselves, and how an allocator rounds, is not seen.

    Args:
        before: tensors that are not counted: the weights.

    Example:
        >>> import torch
        >>> from fish_tuning.experiments.costs.live_bytes import LiveBytes
        >>> with LiveBytes() as live:
        ...     kept = torch.zeros(10) + torch.zeros(10)
        >>> live.now["activations"], live.peak()
        (40, 120)
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = {ACTIVATIONS: 0, GRADIENTS: 0}
        self._known: dict[int, tuple[Any, int, str | None]] = {}  # by memory: its end, its bytes, what it is
        self._most: dict[int, int] = {0: 0}  # by bytes of gradients: the most bytes of activations beside them
        for tensor in before:
            self._know(tensor, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._know(leaf, ACTIVATIONS)
        return made

    def of_gradients(self, parameters: Iterable[nn.Parameter]) -> list[RemovableHandle]:
        """Count what these get as `.grad` as gradients, from when they have got it."""

        def arrived(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self._turn(parameter.grad)

        return [parameter.register_post_accumulate_grad_hook(arrived) for parameter in parameters]

    def peak(self, share: float = 1.0, beside: int | None = None) -> int:
        """The most bytes alive at one time, where `share` of the gradients count.

        With `beside`, all the gradients' bytes are there from the start, as while they are accumulated.
        """
        if beside is not None:
            return self.most_activations + round(share * beside)
        return max(activations + round(share * gradients) for gradients, activations in self._most.items())

    @property
    def most_activations(self) -> int:
        """The most bytes alive at one time beside the gradients."""
        return max(self._most.values())

    def _know(self, tensor: Tensor, kind: str | None) -> None:
        if tensor.layout is not torch.strided:
            for part in (tensor._indices(), tensor._values()) if tensor.layout is torch.sparse_coo else ():
                self._know(part, kind)
            return
        memory = tensor.untyped_storage()
        key = id(memory)
        if key in self._known:
            return
        size = memory.nbytes()
        self._known[key] = weakref.ref(memory, lambda _: self._forget(key)), size, kind
        self._count(size, kind)

    def _forget(self, key: int) -> None:
        _, size, kind = self._known.pop(key)
        self._count(-size, kind)

    def _turn(self, gradient: Tensor) -> None:
        key = id(gradient.untyped_storage())
        end, size, kind = self._known.get(key, (None, 0, GRADIENTS))
        if kind == ACTIVATIONS:
            self._known[key] = end, size, GRADIENTS
            self._count(-size, ACTIVATIONS)
            self._count(size, GRADIENTS)

    def _count(self, size: int, kind: str | None) -> None:
        if kind is not None:
            self.now[kind] += size
            gradients, activations = self.now[GRADIENTS], self.now[ACTIVATIONS]
            self._most[gradients] = max(self._most.get(gradients, 0), activations)
