"""Deep models: what all of their layers need follows from what few of them do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fish_tuning.experiments.costs.fake_models import VALUES
from fish_tuning.experiments.costs.live_bytes import LiveBytes

DEPTHS = (3, 4, 5)  # that are looked at; three tell whether each layer adds the same
_MOST_SHARES = (0.0, 0.5, 1.0)


class Peaks(Protocol):
    """The most bytes that are alive at one time; see `LiveBytes`."""

    @property
    def most_activations(self) -> int: ...

    def peak(self, share: float = 1.0, beside: int | None = None) -> int: ...


class Extrapolated:
    """Peaks of a model of `left` more layers than the deeper of two."""

    def __init__(self, shallow: Peaks, deep: Peaks, left: int) -> None:
        self.shallow, self.deep, self.left = shallow, deep, left

    @property
    def most_activations(self) -> int:
        return self._further(self.shallow.most_activations, self.deep.most_activations)

    def peak(self, share: float = 1.0, beside: int | None = None) -> int:
        if beside is not None:
            return self.most_activations + round(share * beside)
        return self._further(self.shallow.peak(share), self.deep.peak(share))

    def _further(self, one: int, other: int) -> int:
        return other + self.left * (other - one)


def of_all_layers(model: nn.Module, run: Callable[[], LiveBytes]) -> Peaks:
    """The peaks of `run`; of a deep model whose layers are alike, those of few layers, carried on to all of them.

    Where three depths are not on a line, or layers differ, it is run with all layers.
    """
    layers = like_layers(model)
    if layers is None or len(layers) <= sum(DEPTHS):
        return run()
    found = []
    for depth in DEPTHS:
        with first_layers(layers, depth):
            found.append(run())
    one, two, three = ([live.most_activations, *map(live.peak, _MOST_SHARES)] for live in found)
    if not all(_on_a_line(*sizes) for sizes in zip(one, two, three, strict=True)):
        return run()
    return Extrapolated(found[1], found[2], len(layers) - DEPTHS[2])


def _on_a_line(one: int, two: int, three: int) -> bool:
    """But for what uneven numbers of entries make: a mask's rarely divide by the number of its tensors."""
    return abs((three - two) - (two - one)) <= 64 + 0.001 * abs(three - two)


def repeated_layers(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of several modules: what FSDP and ZeRO-3 gather one after another."""
    found: list[nn.ModuleList] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) > 1 and not isinstance(module, BaseTunerLayer):
                found.append(child)
            else:
                look(child)

    look(model)
    return found


def like_layers(model: Any) -> nn.ModuleList | None:
    """The model's one list of layers that are alike, if it has one."""
    kinds = getattr(getattr(model, "config", None), "layer_types", None)
    found = repeated_layers(model)
    if len(found) != 1 or len(set(kinds or ())) > 1:
        return None
    (layers,) = found
    return layers if len({_signature(layer) for layer in layers}) == 1 else None


def _signature(layer: nn.Module) -> Any:
    parameters = tuple(
        (n, None if n.endswith(VALUES) else tuple(p.shape), p.dtype, p.requires_grad)
        for n, p in layer.named_parameters()
    )
    return tuple((n, type(m).__name__) for n, m in layer.named_modules()), parameters


@contextmanager
def first_layers(layers: nn.ModuleList, number: int) -> Iterator[None]:
    """A model without its other layers for a while."""
    whole = layers._modules
    layers._modules = dict(list(whole.items())[:number])
    try:
        yield
    finally:
        layers._modules = whole
