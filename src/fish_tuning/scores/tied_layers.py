"""A table that several layers read or multiply with: all uses are added up before squaring."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.scores.example_gradients import ExampleGradients, OfRows, OfTable, OuterProducts
from fish_tuning.scores.layer_rules import looks_up, scaled
from fish_tuning.scores.watched_layers import Arrived, BatchedLayer, Call, Pass, as_multiplied, exactly


class TiedLayers(BatchedLayer):
    """The layers that use one table, the weight of embeddings (scaled ones too) and of plain linear layers."""

    def __init__(self, modules: list[nn.Module], name: str, state: Pass) -> None:
        super().__init__(modules[0], {"weight": name}, state)
        self.modules = modules

    @staticmethod
    def can_watch(modules: list[nn.Module], table: Tensor) -> bool:
        plain = all(looks_up(module) or type(module).forward is nn.Linear.forward for module in modules)
        changed = any(getattr(module, "max_norm", None) for module in modules)
        return plain and not changed and all(getattr(module, "weight", None) is table for module in modules)

    def watch(self) -> None:
        self.handles = [module.register_forward_hook(self.after_forward, with_kwargs=True) for module in self.modules]

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.names or self.state.anchor is None:
            return None
        x = next(iter((*args, *kwargs.values())))
        if isinstance(module, nn.Linear):
            self.look_at_order(x)
        return self.probe(output, module, (x,))

    def calls_by_example(self, arrived: list[Arrived]) -> list[Call]:
        calls = []
        for module, (kept,), g in arrived:
            if not self.examples_in_order(g.shape):
                return []
            examples, linear = self.state.batch_size, isinstance(module, nn.Linear)
            x = exactly(as_multiplied(kept, g.dtype))
            x = x.reshape(examples, -1, x.shape[-1]) if linear else x.reshape(examples, -1)
            g = self.state.scale.unscaled(g.float())
            calls.append((module, x, g.reshape(examples, -1, g.shape[-1])))
        return calls

    def gradients(self, calls: list[Call]) -> Iterator[tuple[str, ExampleGradients]]:
        (name,) = self.names.values()
        table: Tensor = self.module.weight  # type: ignore[assignment]
        read = [(x, _of_read(module, x, g)) for module, x, g in calls if isinstance(module, nn.Embedding)]
        multiplied = [(g, x) for module, x, g in calls if isinstance(module, nn.Linear)]
        rows = OfRows(*_joined(read), table.shape[0]) if read else None
        products = OuterProducts(*_joined(multiplied)) if multiplied else None
        yield name, OfTable(rows, products) if rows and products else rows or products  # type: ignore[misc]


def _of_read(module: nn.Embedding, ids: Tensor, g: Tensor) -> Tensor:
    """The gradient at the rows that one of the embeddings read: its own padding gets none, another's may differ."""
    g = scaled(module, g)
    return g if module.padding_idx is None else g.masked_fill((ids == module.padding_idx)[..., None], 0)


def _joined(calls: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    left, right = (torch.cat(side, dim=1) for side in zip(*calls, strict=True))
    return left, right
