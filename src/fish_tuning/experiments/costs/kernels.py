"""What a GPU's kernels keep for the backward pass, on tensors that are on no GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# What autocast computes in fp32 on CUDA and not on a CPU.
_IN_32_BITS = {
    F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss,
    F.smooth_l1_loss, F.binary_cross_entropy_with_logits, F.softplus, F.cosine_similarity,
    torch.softmax, torch.log_softmax, torch.logsumexp, torch.exp, torch.log, torch.pow, torch.rsqrt, torch.norm,
    torch.sum, torch.cumsum, torch.prod,
    Tensor.softmax, Tensor.log_softmax, Tensor.exp, Tensor.log, Tensor.pow, Tensor.__pow__, Tensor.rsqrt, Tensor.norm,
    Tensor.sum, Tensor.cumsum, Tensor.prod,
}  # fmt: skip


def matmul_workspace() -> int:
    """Bytes that torch gives cuBLAS once and for all: for the thread of forward passes, and for that of backward ones.

    Each 32 MiB on Hopper and later GPUs, 8.1 MiB on earlier ones. Where there is no GPU to ask, a later one is taken.
    """
    later = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)
    return 2 * 1024 * (8 * 4096 if later else 2 * 4096 + 8 * 16)


class GpuKernels(TorchFunctionMode):
    """While this is entered, dropout, attention and autocast keep what they keep on CUDA.

    Dropout keeps one byte an entry, where a CPU keeps a number. Attention is fused with dropout too, where a CPU writes
    the whole matrix of probabilities; the fused kernels of both keep their output and one fp32 number a row. Autocast
    computes norms, sums and losses in fp32.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in _IN_32_BITS and torch.is_autocast_enabled("cpu"):
            args = [_in_32_bits(arg) for arg in args]
            kwargs = {name: _in_32_bits(arg) for name, arg in kwargs.items()}
        return func(*args, **kwargs)


class NoChance(TorchFunctionMode):
    """While this is entered, a single random number is 0.5, so that code can look at it: LoHa leaves modules out so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.rand and args == (1,):
            return torch.tensor([0.5])
        return func(*args, **(kwargs or {}))


def _in_32_bits(value: Any) -> Any:
    low = isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4
    return value.float() if low else value


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0:
        return input
    dropped: Tensor = torch.native_dropout(input, p, True)[0]
    return dropped


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (each.to(dtype) for each in (query, key, value))
    output: Tensor = _Fused.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]
    return output


class _Fused(torch.autograd.Function):
    """Shapes alone: keys and values that several heads share stay as they are."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        # Laid out as models want it next, with the heads of a token together.
        output = (
            query.transpose(-3, -2).new_empty(*query.transpose(-3, -2).shape[:-1], value.shape[-1]).transpose(-3, -2)
        )
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32), mask)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
