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
    if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward and module.max_norm is None:
        return partial(_embedding, module) if _on_cpu(module) else None
    return None


def _on_cpu(module: nn.LayerNorm | nn.Embedding) -> bool:
    return module.weight is not None and module.weight.device.type == "cpu"


def _embedding(module: nn.Embedding, input: Tensor) -> Tensor:
    table = module.weight.float() if module.weight.dtype in _SHORT else module.weight
    found = F.embedding(input, table, module.padding_idx, None, 2.0, module.scale_grad_by_freq, module.sparse)
    return found.to(module.weight.dtype)


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
