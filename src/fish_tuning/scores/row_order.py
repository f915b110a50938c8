"""Where a layer's rows are all tokens of a batch: whether data decided their order."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

_BY_DATA = re.compile(r"Index|Gather|Scatter|Take|Sort|MaskedSelect")  # autograd's nodes of what picks rows by numbers
_MOST_NODES = 1000


def ordered_by_data(x: Tensor, batch_size: int) -> bool:
    """Whether rows of `x` were picked one by one on their way from tensors that have a row an example.

    As with tokens that are routed to experts. A proof does not show that: the rows of one batch may be in their places,
    and those of the next not. Autograd's graph does; of an input that needs no gradient there is none, which tells
    nothing (False).
    """
    left: list[Any] = [x.grad_fn]
    seen: set[Any] = set()
    while left and len(seen) < _MOST_NODES:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        shapes = [of_output.shape for of_output in getattr(node, "_input_metadata", ())]
        if any(len(shape) > 1 and shape[0] == batch_size for shape in shapes):
            continue
        if _BY_DATA.match(node.name()) and _along_rows(node, shapes):
            return True
        left += [earlier for earlier, _ in node.next_functions]
    return False


def _along_rows(node: Any, shapes: list[Any]) -> bool:
    """Not where a column is picked of each row, as an expert's weight of each token's."""
    dimension: int = getattr(node, "_saved_dim", 0)
    if not shapes or not len(shapes[0]):
        return True
    return (dimension - 2**64 if dimension >= 2**63 else dimension) % len(shapes[0]) == 0
