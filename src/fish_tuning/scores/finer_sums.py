"""Gradients of 16 bits that torch adds up in 16 bits on a CPU: added up in fp32, and rounded once.

There, the backward passes of LayerNorm and embeddings add each position to a sum of the weight's dtype, beside which
small ones are lost: in bfloat16 a bias's gradient came out 0.3 off over 64 positions, 0.8 over 256. A GPU adds in fp32.
Everything else keeps its bits: the outputs and the gradients of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SHORT = (torch.bfloat16, torch.float16)


def finer_forward(module: nn.Module) -> Callable[..., Tensor] | None:
    """The module's forward pass with a finer backward pass; None where torch's is fine, or the module's is its own."""
    if "forward" in vars(module):
        return None
    if isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward:
        return partial(_layer_norm, module) if _on_cpu(module) else None
    if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
        changed = module.max_norm is not None or module.scale_grad_by_freq or module.sparse
        return partial(_embedding, module) if _on_cpu(module) and not changed else None
    return None


def _on_cpu(module: nn.LayerNorm | nn.Embedding) -> bool:
    return module.weight is not None and module.weight.device.type == "cpu"


def _embedding(module: nn.Embedding, input: Tensor) -> Tensor:
    if module.weight.dtype not in _SHORT:
        return F.embedding(input, module.weight, module.padding_idx)
    found = F.embedding(input, module.weight.detach())
    given: Tensor = _EmbeddingSums.apply(found, module.weight, input, module.padding_idx)  # type: ignore[no-untyped-call]
    return given


def _layer_norm(module: nn.LayerNorm, input: Tensor) -> Tensor:
    if input.dtype not in _SHORT:  # what decides, under an autocast too
        return F.layer_norm(input, module.normalized_shape, module.weight, module.bias, module.eps)
    weight, bias = (None if own is None else own.detach() for own in (module.weight, module.bias))
    output = F.layer_norm(input, module.normalized_shape, weight, bias, module.eps)
    given: Tensor = _LayerNormSums.apply(  # type: ignore[no-untyped-call]
        output, module.weight, module.bias, input.detach(), module.normalized_shape, module.eps
    )
    return given


class _LayerNormSums(torch.autograd.Function):
    """Identity on a LayerNorm's output whose backward pass gives the gradients of its weight and bias."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, weight: Tensor, bias: Tensor | None, *call: Any) -> Tensor:
        input, ctx.shape, ctx.eps = call
        ctx.save_for_backward(input)
        ctx.dtypes = [own if own is None else own.dtype for own in (weight, bias)]
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (input,), g = ctx.saved_tensors, gradients[0].float()
        positions = list(range(g.dim() - len(ctx.shape)))
        of_weight, of_bias = ctx.dtypes
        weight = (g * F.layer_norm(input.float(), ctx.shape, eps=ctx.eps)).sum(positions).to(of_weight)
        bias = None if of_bias is None else g.sum(positions).to(of_bias)
        return gradients[0], weight, bias, None, None, None


class _EmbeddingSums(torch.autograd.Function):
    """Identity on what was read from a table whose backward pass gives the table's gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, table: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype, ctx.padding = table.shape, table.dtype, padding
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (ids,), g = ctx.saved_tensors, gradients[0]
        rows, inverse = ids.flatten().unique(return_inverse=True)
        sums = g.new_zeros(len(rows), g.shape[-1], dtype=torch.float32).index_add_(0, inverse, g.flatten(0, -2).float())
        of_table = g.new_zeros(ctx.shape, dtype=ctx.dtype)
        of_table[rows] = sums.to(ctx.dtype)
        if ctx.padding is not None:
            of_table[ctx.padding] = 0
        return None, of_table, None, None
