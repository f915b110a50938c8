"""What values would decide, on tensors that have none: which expert gets a token, and where a text ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What the configurations of transformers call the number of experts a layer chooses from.
_NUMBERS_OF_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
_aten: Any = torch.ops.aten
_GROUPED: Any = _aten._grouped_mm.default if hasattr(_aten, "_grouped_mm") else None  # newer versions of torch


@contextmanager
def decided(model: Any) -> Iterator[None]:
    """Decide what the values would, for a model whose tensors are fake: experts get equal shares, texts one end each.

    Dispatch modes are on in the backward pass too, and so where layers are computed again.
    """
    with ExitStack() as stack:
        if experts := experts_of(model):
            stack.enter_context(EqualShares(experts))
        if looks_for_ends(model):
            stack.enter_context(OneEndEach())
        yield


def experts_of(model: Any) -> int:
    """How many experts a layer of the model chooses from; 0 for a model that has none."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return 0
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _NUMBERS_OF_EXPERTS)
    return next((number for number in found if isinstance(number, int) and number > 1), 0)


def looks_for_ends(model: Any) -> bool:
    """Whether a classifier takes what its decoder makes of the last end-of-text token: T5's, BART's and their like."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    return getattr(config, "is_encoder_decoder", False) and type(base).__name__.endswith("ForSequenceClassification")


class EqualShares(TorchDispatchMode):
    """While this is entered, a router's choice has values: each of the experts gets as many tokens as any other.

    What is computed of tensors with values alone has values too, so that loops over the experts can go by them. The
    matrix product of all experts in one kernel, for which torch knows no shapes but in bf16, gets its shape here.
    """

    def __init__(self, experts: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.experts = experts

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _GROUPED:
            return _grouped_product(*args, **kwargs)
        if func is _aten.topk.default and args[0].shape[-1] == self.experts:
            values, chosen = func(*args, **kwargs)
            return values, self._spread(chosen)
        if func is _aten.argmax.default and args[0].shape[-1] == self.experts:
            return self._spread(func(*args, **kwargs))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        counts = func is _aten.zeros.default and kwargs.get("dtype") is torch.long  # what one_hot writes ones into
        if counts or (tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _spread(self, chosen: Tensor) -> Tensor:
        with unset_fake_temporarily():
            return (torch.arange(chosen.numel()) % self.experts).view(chosen.shape)


def _grouped_product(one: Tensor, other: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    if one.dim() == other.dim() == 2 and offs is not None:
        return one.new_empty(offs.shape[0], one.shape[0], other.shape[1])
    if one.dim() == other.dim() == 3:
        return one.new_empty(one.shape[0], one.shape[1], other.shape[2])
    return one.new_empty(one.shape[-2], other.shape[-1])


class OneEndEach(TorchFunctionMode):
    """While this is entered, a mask over the tokens of a batch is taken to pick one token of each text."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.unique_consecutive:
            return args[0].new_empty(1)  # all texts have as many
        if func is Tensor.__getitem__ and isinstance(args[1], tuple) and _is_mask(args[1][0]):
            mask, *others = args[1]
            texts, tokens = (torch.arange(mask.shape[0]), torch.zeros(mask.shape[0], dtype=torch.long))
            return args[0][(texts, tokens, *others)]
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype is torch.bool and index.dim() == 2
