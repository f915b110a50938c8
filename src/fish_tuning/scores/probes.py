"""Watch layers during a batched pass and add up their per-example gradients as the backward pass meets them.

An identity is put behind each watched layer. It saves what the layer's rule needs of the call, as autograd saves
tensors (so activation checkpointing drops and recomputes it), and hands it, with the gradient at the output, to the
rule. The backward pass is asked for the gradient of one dummy scalar that every identity depends on: autograd then
walks the whole graph but computes no weight gradient and touches no `.grad`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import fish_tuning.scores.peft_rules  # noqa: F401 (registers the rules of PEFT's layers)
from fish_tuning.scores.candidates import Candidates
from fish_tuning.scores.checks import Check
from fish_tuning.scores.media import Tokens, beside_texts, media_tokens, rows_by_data
from fish_tuning.scores.mixed_precision import without_autocast
from fish_tuning.scores.recomputed_layers import RecomputedLayer
from fish_tuning.scores.row_order import is_tracked
from fish_tuning.scores.small_products import SmallProducts
from fish_tuning.scores.totals import Totals
from fish_tuning.scores.watched_layers import Pass, WatchedLayer


class Probes:
    """Identities behind the layers that own `names`, as far as they can be watched; `names` tells which.

    Use as a context manager, which removes the hooks. Between `forward` passes, `backward(losses, into)` adds the
    per-example gradients to the totals `into` and, when it is given, fills a `Check`. `broken` maps tensors whose
    layer was called in a way that cannot be scored in a batch to the reason; nothing is added for them. The model is
    looked at when something is asked: who scores single examples alone does not pay for it.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.state = Pass()
        self._model, self._asked = model, set(names)
        self._inside = False

    @cached_property
    def _candidates(self) -> Candidates:
        return Candidates(self._model)

    @cached_property
    def _layers(self) -> list[WatchedLayer]:
        layers = self._candidates.first(self._asked, self.state) if self._asked else []
        for layer in layers if self._inside else ():
            layer.watch()
        return layers

    @cached_property
    def _media_tokens(self) -> Tokens:
        return media_tokens(self._model)

    @cached_property
    def _beside_texts(self) -> set[nn.Module]:
        return beside_texts(self._model)

    @cached_property
    def names(self) -> list[str]:
        return [name for layer in self._layers for name in layer.names.values()]

    def __enter__(self) -> Probes:
        self._inside = True
        self._handle = self._model.register_forward_pre_hook(self._note_inputs, with_kwargs=True)
        for layer in vars(self).get("_layers", ()):
            layer.watch()
        return self

    def __exit__(self, *_: object) -> None:
        self._inside = False
        self._handle.remove()
        for layer in vars(self).get("_layers", ()):
            layer.unwatch()

    def _note_inputs(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is given copies of the batch's tensors."""
        if self.state.anchor is not None and self.state.into is None:
            self.state.given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]

    @property
    def broken(self) -> dict[str, str]:
        return self.state.broken

    @property
    def expanded(self) -> list[WatchedLayer]:
        """Layers whose one row became a row an example in the last forward pass."""
        return self.state.expanded

    def done_again(self) -> list[str]:
        """The tensors that are scored by doing again what a module does."""
        layers = [layer for layer in self._layers if isinstance(layer, RecomputedLayer)]
        return [name for layer in layers for name in layer.names.values()]

    def by_rules_of_users(self, names: Iterable[str]) -> list[str]:
        """Those of the tensors that are watched by a rule that did not come with this library."""
        found = {name for layer in self._layers if layer.of_users for name in layer.names.values()}
        return [name for name in names if name in found]

    def release(self, names: Iterable[str], further_out: bool = True) -> set[str]:
        """Watch these tensors no longer where they were; returns those that are watched further out from now on."""
        gone = set(names)
        for layer in self._layers:
            layer.names = {local: name for local, name in layer.names.items() if name not in gone}
        again = self._candidates.further_out(gone, self.state) if further_out and gone else []
        for layer in again:
            if self._inside:
                layer.watch()
        self._layers += again
        moved = {name for layer in again for name in layer.names.values()}
        self.names = [name for name in self.names if name not in gone - moved]
        return moved

    def shapes_seen(self) -> AbstractContextManager[None]:
        """For a forward pass: remember what the modules give, which tells from where a tensor can be watched."""
        return self._candidates.shapes_seen(self.state)

    def untold(self) -> bool:
        """Whether a layer had rows of unknown order."""
        return any(layer.untold and layer.by_data is None for layer in self._layers)

    def by_data(self) -> list[str]:
        """The tensors of layers whose rows data have put in their order, or may have for all that is known.

        All others that were untold are settled from now on. Where the last pass should have told and did not get as
        far, nothing is known of them.
        """
        for layer in self._layers:
            if layer.untold and layer.by_data is None:
                layer.by_data = self.state.tracked
        return [name for layer in self._layers if layer.by_data for name in layer.names.values()]

    def rows_by_data(self, batch: Mapping[str, Tensor]) -> bool:
        """As `media.rows_by_data`, for this model."""
        return rows_by_data(batch, self._media_tokens)

    def start(self, batch_size: int, device: torch.device, batch: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Call before each forward pass; FisherError where the batch has as many images as rows, but not one a row."""
        self.state.batch_size = batch_size
        self.state.given, self.state.shapes = [], {key: value.shape for key, value in batch.items()}
        self.state.expanded, self.state.broken, self.state.small = [], {}, SmallProducts()
        by_data = self.rows_by_data(batch)
        self.state.by_data = self._beside_texts if by_data else set()
        self.state.tracked = is_tracked()
        self.state.order.forget_nodes()
        self.state.anchor = torch.zeros((), device=device, requires_grad=True)
        for layer in self._layers:
            layer.start()

    def leave(self) -> None:
        """No backward pass follows the last forward pass."""
        self.state.anchor, self.state.given = None, []
        self.state.order.forget_nodes()

    def backward(
        self, losses: list[Tensor], into: Totals, check: Check | None = None, stand_ins: Iterable[Tensor] = ()
    ) -> None:
        """One backward pass for each (n,) loss vector of the last forward pass; `stand_ins` get their gradients too."""
        state = self.state
        if state.anchor is None:
            raise RuntimeError("start() comes before backward()")
        state.into, state.check = into, check
        state.order.forget_nodes()
        for number, loss in enumerate(losses, start=1):
            weights = torch.ones_like(loss) if check is None else check.weights.to(loss)
            weights = weights * state.scale.value
            torch.autograd.backward(loss, weights, inputs=[state.anchor, *stand_ins], retain_graph=number < len(losses))
            with torch.no_grad(), without_autocast(state.anchor.device):  # as it is within the backward pass
                for layer in self._layers:
                    layer.add_up()  # calls that got no gradient never arrive
                state.small.flush(into)
        state.broken |= dict.fromkeys(state.small.changed, "its output's gradient is changed in place")
        state.into = state.check = state.anchor = None
        state.given = []
