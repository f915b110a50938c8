"""Mean gradients of the frozen weights under an adapter, from the layers' inputs and the gradients of their outputs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fish_tuning.errors import FisherError


class WeightGradients:
    """While the context is open, every backward pass adds to `sums[name]`, (out, in) in fp32, the gradient of a weight.

    The weight itself is never asked for a gradient, so it may be frozen, tied or quantised. A layer that is called
    several times adds up. `backward` computes nothing else: no `.grad` of the model is touched.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.sums: dict[str, Tensor] = {}
        self._layers = layers
        self._hooks: list[RemovableHandle] = []
        self._anchor = torch.zeros((), requires_grad=True)

    def __enter__(self) -> WeightGradients:
        self._hooks = [
            layer.register_forward_hook(partial(self._tap, name), with_kwargs=True)
            for name, layer in self._layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def backward(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            raise FisherError(
                f"The loss depends on none of the {len(self._layers)} adapted layers, such as "
                f"{next(iter(self._layers))!r}. Is the forward pass under torch.no_grad(), or are they never called?"
            )
        torch.autograd.backward(loss, inputs=[self._anchor])

    def _tap(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        inputs = args[0] if args else next(iter(kwargs.values()))
        tapped: Tensor = _Tap.apply(output, inputs.detach(), self._anchor, partial(self._add, name))  # type: ignore[no-untyped-call]
        return tapped

    def _add(self, name: str, gradient: Tensor, inputs: Tensor) -> None:
        product = gradient.float().flatten(0, -2).T @ inputs.float().flatten(0, -2)
        if name in self.sums:
            self.sums[name] += product
        else:
            self.sums[name] = product


class _Tap(torch.autograd.Function):
    """The identity, which hands on its gradient and the layer's inputs; these are saved as checkpointing asks.

    The anchor makes it part of the graph where neither the layer's weight nor its inputs are.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, anchor: Tensor, add: Any) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.add = add
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        ctx.add(gradient, *ctx.saved_tensors)
        return gradient, None, None, None
