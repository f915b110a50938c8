"""Whether data decided which rows a layer has, and in which order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fish_tuning.model_walks import every_parameter

_BY_DATA = re.compile(r"Index|Gather|Scatter|Take|Sort|MaskedSelect")  # autograd's nodes of what picks rows by numbers
_OF_A_PARAMETER = "torch::autograd::AccumulateGrad"
_OUTPUTS = "_input_metadata"  # what a node's gradients come in for
_MOST_NODES = 1000


def ordered_by_data(x: Tensor, batch_size: int) -> bool:
    """Whether rows of `x` were picked one by one on their way from tensors (n, P, ...) of n examples.

    As with tokens that are routed to experts. A proof does not show that: the rows of one batch may be in their places,
    and those of the next not. Autograd's graph does; of an input that needs no gradient there is none, which tells
    nothing (False; `tracked` gives it one). Picked within each example, as a text's last token, they are in order.
    """
    if not hasattr(x.grad_fn, _OUTPUTS):  # nor has a version of torch that tells no shapes
        return False
    left: list[Any] = [x.grad_fn]
    seen: set[Any] = set()
    while left and len(seen) < _MOST_NODES:
        node = left.pop()
        if node is None or node in seen or _has_rows(node, {batch_size}):
            continue
        seen.add(node)
        earlier = [each for each, _ in node.next_functions if each is not None and each.name() != _OF_A_PARAMETER]
        picks = bool(_BY_DATA.match(node.name())) and _along_rows(node)
        if picks and not all(_has_rows(each, {batch_size, x.shape[0]}) for each in earlier):
            return True
        left += earlier
    return False


@contextmanager
def tracked(model: nn.Module) -> Iterator[None]:
    """Forward passes have a graph from the first layer on, as if all trained, of which no tensor is kept."""
    frozen = [
        parameter
        for parameter in every_parameter(model)
        if not parameter.requires_grad and parameter.is_floating_point() and not parameter.is_inference()
    ]
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        with saved_tensors_hooks(_not_kept, _not_kept):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _not_kept(_: Tensor) -> Any:
    return None


def _shapes(node: Any) -> list[Any]:
    """Of what the node's operation gave."""
    return [of_output.shape for of_output in getattr(node, _OUTPUTS, ())]


def _has_rows(node: Any, numbers: set[int]) -> bool:
    """So many, each of several dimensions."""
    return any(len(shape) > 2 and shape[0] in numbers for shape in _shapes(node))


def _along_rows(node: Any) -> bool:
    """Not where a column is picked of each row, as an expert's weight of each token's."""
    dimension: int = getattr(node, "_saved_dim", 0)
    shapes = _shapes(node)
    if not shapes or not len(shapes[0]):
        return True
    return (dimension - 2**64 if dimension >= 2**63 else dimension) % len(shapes[0]) == 0
