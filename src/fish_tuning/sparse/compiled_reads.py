"""What a compiled model reads: the memory that values are written into, looked at before each of its runs.

The graph has no part in it. torch.compile asks its guards before it fetches what a graph reads, in every call; one of
ours writes what has changed since. That costs a call of Python for each masked tensor, compiles nothing again, and
`fullgraph=True` holds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor


def read_compiled(masked: Any) -> Tensor:
    """What a graph reads of a masked tensor. torch.compile traces this."""
    from torch._dynamo.comptime import comptime  # which takes seconds where nothing is compiled

    comptime(_look_from_now_on)
    tensor: Tensor = masked.plain
    return tensor


def _look_from_now_on(context: Any) -> None:
    """While `read_compiled` is traced: look now, and before each run of the graph."""
    from torch._dynamo.guards import install_guard

    # torch has no official way to a guard of one's own yet, and says so there.
    traced = context.get_local("masked")._i_will_not_complain_if_bc_breaks_VariableTracker().realize()
    traced.value.settle()
    install_guard(traced.source.make_guard(_look_for(_kind(traced.value))))


@functools.cache
def _look_for(kind: tuple[Any, ...]) -> Callable[[Any, Any], None]:
    """What adds the look to a graph's guards; the graph reads a tensor of this kind."""

    def is_settled(masked: Any) -> bool:
        # What froze or thawed gets another tensor here. torch's own guard may have passed the one before.
        return masked.settle() or _kind(masked) == kind

    def add_look(builder: Any, guard: Any) -> None:
        guards, told = builder.get_guard_manager(guard), ["the values of a masked tensor are written into it"]
        try:
            guards.add_lambda_guard(is_settled, told, guard.user_stack)
        except TypeError:  # before torch 2.11
            guards.add_lambda_guard(is_settled, told)

    return add_look


def _kind(masked: Any) -> tuple[Any, ...]:
    return masked.plain.requires_grad, masked.plain.dtype, masked.plain.device
