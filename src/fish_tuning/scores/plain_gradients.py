"""Plain gradients of chosen tensors: what autograd itself gives, beside every rule."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fish_tuning.errors import FisherError
from fish_tuning.model_walks import every_module
from fish_tuning.scores.finer_sums import finer_forward
from fish_tuning.scores.loss_scale import LossScale

Take = Callable[[str, Tensor], None]
Slot = tuple[nn.Module, str]


class PlainGradients:
    """Stand-ins take the parameters' places in a forward pass and receive their gradients.

    They give them up one at a time: a whole model's never lie side by side, and what hangs on the parameters themselves
    (`.grad`, hooks) stays out of it.
    """

    def __init__(self, model: nn.Module, trainable: dict[str, nn.Parameter]) -> None:
        self.trainable = trainable
        self._slots = _slots(model, trainable)
        self._finer = {
            name: [(module, forward) for module, _ in slots if (forward := finer_forward(module)) is not None]
            for name, slots in self._slots.items()
        }
        self._reach_checked: set[str] = set()
        self.scale = LossScale(fp16=False)  # of the losses whose gradients come

    def stand_ins(self, names: Iterable[str], take: Take) -> dict[str, Tensor]:
        """{name: stand-in}. A backward pass calls `take(name, fp32 gradient)` for each that its loss depends on."""

        def receive(name: str, stand_in: Tensor) -> None:
            gradient, stand_in.grad = stand_in.grad, None
            if gradient is not None:
                take(name, self.scale.unscaled(gradient.float()))

        made = {name: self.trainable[name].detach().requires_grad_() for name in names}
        for name, stand_in in made.items():
            stand_in.register_post_accumulate_grad_hook(partial(receive, name))
        return made

    def in_place(self, stand_ins: dict[str, Tensor]) -> InPlace:
        """Puts the stand-ins into every place of their tensors, for as many forward passes as are wanted."""
        return InPlace(
            [
                (slot, self.trainable[name], stand_in)
                for name, stand_in in stand_ins.items()
                for slot in self._slots[name]
            ],
            {module: forward for name in stand_ins for module, forward in self._finer.get(name, ())},
        )

    def check_reach(self, loss: Tensor, names: Collection[str]) -> None:
        """Refuse a tensor that its module gets at by another way than its attribute: no stand-in can take its place."""
        if self._reach_checked.issuperset(names):
            return
        own = {name: self.trainable[name] for name in names}
        self._reach_checked |= own.keys()
        gradients = torch.autograd.grad(loss.sum(), list(own.values()), allow_unused=True, retain_graph=True)
        for name, gradient in zip(own, gradients, strict=True):
            if gradient is not None:
                raise FisherError(
                    f"{name!r} cannot be scored: its layer keeps a reference to it of its own, past the module's "
                    "attribute. Set requires_grad_(False) on it, or use another PEFT method."
                )


class InPlace:
    """While it is entered, other tensors are where a model's parameters were.

    As `torch.func.functional_call` does, with the places known beforehand: to find them by name again took a hundredth
    of a small model's pass.
    """

    def __init__(
        self,
        exchanged: list[tuple[Slot, nn.Parameter, Tensor]],
        forwards: Mapping[nn.Module, Callable[..., Tensor]] = MappingProxyType({}),
    ) -> None:
        self.exchanged, self.forwards = exchanged, forwards

    def __enter__(self) -> None:
        for (module, local), _, stand_in in self.exchanged:
            module._parameters[local] = stand_in  # type: ignore[assignment]
        for module, forward in self.forwards.items():
            module.__dict__["forward"] = forward

    def __exit__(self, *_: object) -> None:
        for (module, local), parameter, _stand_in in self.exchanged:
            module._parameters[local] = parameter
        for module in self.forwards:
            del module.__dict__["forward"]


def _slots(model: nn.Module, trainable: dict[str, nn.Parameter]) -> dict[str, list[Slot]]:
    """Every place of each tensor, a tied one's several; a module that is registered twice counts once."""
    names = {id(parameter): name for name, parameter in trainable.items()}
    slots: dict[str, list[Slot]] = {name: [] for name in trainable}
    for module in every_module(model):
        for local, parameter in module._parameters.items():
            if id(parameter) in names:
                slots[names[id(parameter)]].append((module, local))
    return slots
