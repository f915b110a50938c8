"""Watch layers during a batched pass and add up their per-example gradients as the backward pass meets them.

An identity is put behind each watched layer. It saves what the layer's rule needs of the call, as autograd saves
tensors (so activation checkpointing drops and recomputes it), and hands it, with the gradient at the output, to the
rule. The backward pass is asked for the gradient of one dummy scalar that every identity depends on: autograd then
walks the whole graph but computes no weight gradient and touches no `.grad`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import fish_tuning.scores.peft_rules  # noqa: F401 (registers the rules of PEFT's layers)
from fish_tuning.errors import FisherError
from fish_tuning.scores.checks import Check, add_checksum
from fish_tuning.scores.example_gradients import Each, ExampleGradients
from fish_tuning.scores.layer_rules import LayerRule, rule_for
from fish_tuning.scores.totals import Totals


class Probes:
    """Identities behind the layers that own `names`, as far as there is a rule for them; `names` tells which.

    Use as a context manager, which removes the hooks. Between `forward` passes, `backward(losses, into)` adds the
    per-example gradients to the totals `into` and, when it is given, fills a `Check`. `broken` maps tensors whose
    layer was called in a way that no rule covers to the reason; nothing is added for them.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.anchor: Tensor | None = None
        self.batch_size = 0
        self.into: Totals | None = None  # set during the backward pass
        self.check: Check | None = None
        self.broken: dict[str, str] = {}
        self.expanded: list[_Layer] = []  # layers whose one row became a row an example in the last forward pass
        self._layers = _watched_layers(model, set(names), self)
        self.names = [name for layer in self._layers for name in layer.names.values()]
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Probes:
        self._handles = [
            layer.module.register_forward_hook(layer.after_forward, with_kwargs=True) for layer in self._layers
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def release(self, names: Iterable[str]) -> None:
        """Watch these tensors no longer."""
        gone = set(names)
        for layer in self._layers:
            layer.names = {local: name for local, name in layer.names.items() if name not in gone}
        self.names = [name for name in self.names if name not in gone]

    def start(self, batch_size: int, device: torch.device) -> None:
        """Call before each forward pass."""
        self.batch_size = batch_size
        self.expanded, self.broken = [], {}
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        for layer in self._layers:
            layer.calls, layer.arrived = 0, []

    def backward(
        self, losses: list[Tensor], into: Totals, check: Check | None = None, stand_ins: Iterable[Tensor] = ()
    ) -> None:
        """One backward pass for each (n,) loss vector of the last forward pass; `stand_ins` get their gradients too."""
        if self.anchor is None:
            raise RuntimeError("start() comes before backward()")
        self.into, self.check = into, check
        for number, loss in enumerate(losses, start=1):
            weights = torch.ones_like(loss) if check is None else check.weights.to(loss)
            torch.autograd.backward(loss, weights, inputs=[self.anchor, *stand_ins], retain_graph=number < len(losses))
            for layer in self._layers:
                layer.add_up()  # calls that got no gradient never arrive
        self.into = self.check = self.anchor = None


class _Layer:
    """One watched layer: collects what the backward pass brings and applies the rule once all its calls are there."""

    def __init__(self, module: nn.Module, rule: LayerRule, names: dict[str, str], probes: Probes) -> None:
        self.module, self.rule, self.names, self.probes = module, rule, names, probes
        self.calls = 0
        self.expand = True
        self.arrived: list[tuple[Tensor, Tensor]] = []

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        probes = self.probes
        if not self.names or probes.anchor is None:
            return None
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None or not isinstance(output, Tensor):
            self._break("its input or output is no tensor")
            return None
        if probes.into is None:  # not a recomputation, which checkpointing does in the backward pass
            self.calls += 1
        if self.expand and isinstance(module, nn.Embedding) and x.shape[0] == 1 < probes.batch_size:
            # One row of positions serves all examples: with a row each, each example's gradient arrives by itself.
            probes.expanded.append(self)
            x, output = (tensor.expand(probes.batch_size, *tensor.shape[1:]) for tensor in (x, output))
        kept = self.rule.keep(module, x, output)
        return _Probe.apply(output, probes.anchor, kept, self)  # type: ignore[no-untyped-call]

    def receive(self, x: Tensor, g: Tensor) -> None:
        size = self.probes.batch_size
        if x.shape[0] != size or g.shape[0] != size:
            self._break(f"it was called with first dimension {x.shape[0]}, not with the {size} examples of the batch")
            return
        self.arrived.append((x, g))
        if len(self.arrived) == self.calls:
            self.add_up()

    @torch.no_grad()
    def add_up(self) -> None:
        arrived, self.arrived = self.arrived, []
        if not arrived or not self.probes.broken.keys().isdisjoint(self.names.values()):
            return
        calls = [self.rule.positions(self.module, _exact(x), _exact(g)) for x, g in arrived]
        x, g = (_joined(list(side)) for side in zip(*calls, strict=True))
        into, check = self.probes.into, self.probes.check
        with torch.autocast(x.device.type, enabled=False):
            if check is not None:
                g = self._add_checksums(check, x, g)
            for name, gradients in self._gradients(x, g):
                squares = gradients.squares()
                into.add(name, squares, gradients.sum)  # type: ignore[union-attr]
                if check is not None and name in check.together:
                    add_checksum(check.of_batch, name, squares, gradients.sum() if check.signed else None)

    def _add_checksums(self, check: Check, x: Tensor, g: Tensor) -> Tensor:
        """Of one row, and of the batch's sum; gives `g` freed of the weights."""
        own = self.names.values()
        if not check.together.isdisjoint(own):
            # To a rule, the positions of all examples put one after another are one example, whose gradient is the sum.
            for name, gradients in self._gradients(*(side.flatten(0, 1)[None] for side in (x, g))):
                if name in check.together:
                    add_checksum(check.of_sum, name, *_looked_at(gradients, check))
        if check.together:
            g = g / check.weights.to(g).view(-1, *[1] * (g.dim() - 1))
        if not check.alone.isdisjoint(own):
            for name, gradients in self._gradients(*(side[check.row, None] for side in (x, g))):
                if name in check.alone:
                    add_checksum(check.of_row, name, *_looked_at(gradients, check))
        return g

    def _gradients(self, x: Tensor, g: Tensor) -> Iterator[tuple[str, ExampleGradients]]:
        for local, gradients in self.rule.gradients(self.module, x, g).items():
            if local not in self.names:
                continue
            if isinstance(gradients, Tensor):
                shape = (x.shape[0], *self.module.get_parameter(local).shape)
                if gradients.shape != shape:
                    raise FisherError(
                        f"The rule of {type(self.module).__name__} gave a tensor of shape {tuple(gradients.shape)} for "
                        f"{local!r}; it must give each example's gradient, here {shape} (no squares, no sum)."
                    )
                gradients = Each(gradients)
            yield self.names[local], gradients

    def _break(self, reason: str) -> None:
        self.probes.broken.update(dict.fromkeys(self.names.values(), reason))


class _Probe(torch.autograd.Function):
    """Identity on `output` whose backward pass hands the layer's input and output gradient to its `_Layer`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, x: Tensor, layer: _Layer) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return output.detach()  # not a view, which in-place layers behind it (ReLU) could not change

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.layer.receive(ctx.saved_tensors[0], grads[0])
        return grads[0], None, None, None


def _looked_at(gradients: ExampleGradients, check: Check) -> tuple[Tensor, Tensor | None]:
    return gradients.squares(), gradients.sum() if check.signed else None


def _joined(calls: list[Tensor]) -> Tensor:
    return calls[0] if len(calls) == 1 else torch.cat(calls, dim=1)


def _exact(tensor: Tensor) -> Tensor:
    """Floats in fp32, for exact sums of squares."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _watched_layers(model: nn.Module, names: set[str], probes: Probes) -> list[_Layer]:
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    layers = []
    for prefix, module in model.named_modules():
        rule = rule_for(module)
        if rule is None:
            continue
        full = {local: f"{prefix}.{local}" if prefix else local for local in rule.parameters(module)}
        # A tensor shared by two layers needs the sum of both before squaring, which no single layer sees.
        own = {
            local: name
            for local, name in full.items()
            if name in names and owners[id(module.get_parameter(local))] == 1
        }
        if own:
            layers.append(_Layer(module, rule, own, probes))
    return layers
