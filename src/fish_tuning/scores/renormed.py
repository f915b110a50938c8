"""Embeddings with `max_norm` write into their table whenever they read it, in evaluation mode too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fish_tuning.model_walks import every_module


@contextmanager
def tables_kept(model: nn.Module) -> Iterator[None]:
    """Puts back what such embeddings have written, to the bit, at the end."""
    tables = {
        module.weight: module.weight.detach().clone()
        for module in every_module(model)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    }
    try:
        yield
    finally:
        with torch.no_grad():
            for table, before in tables.items():
                table.copy_(before)
