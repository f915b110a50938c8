"""Counts what a GPU would have the program wait for, or would have to be sent or asked, on tensors of the CPU.

A GPU works through what it is given while the program goes on; one look at a value, or one tensor whose size depends
on values, and the program waits until all is done, with nothing given to the GPU meanwhile.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# A value that the program looks at, or a size that depends on values.
LOOKS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "_coalesce",
}  # fmt: skip
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
# Python data that become a tensor, which a GPU has to be sent.
SENT = {"lift_fresh", "lift_fresh_copy"}
_TO_HOST = {Tensor.cpu, Tensor.numpy, Tensor.tolist}
_MAKERS: set[Any] = {
    torch.tensor, torch.as_tensor, torch.from_numpy, torch.zeros, torch.ones, torch.full, torch.empty, torch.arange,
    torch.rand, torch.randn, torch.randint, torch.randperm, torch.linspace, torch.eye,
}  # fmt: skip


def name_of(function: Any) -> str:
    """`nonzero` of `aten.nonzero.default`."""
    return str(function._schema.name).partition("::")[2]


def look(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The kind of wait that an operation on a GPU's tensors is, if it is one."""
    name = name_of(function)
    if name in LOOKS:
        return name
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return name
    if name in INDEXING and any(
        isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in tree_leaves(args[1])
    ):
        return f"{name} by a mask"
    return None


class DeviceWaits:
    """`with DeviceWaits() as waits:` counts into `waits.counts`, by kind and the line that asked.

    What is made on the CPU without naming a device counts, since it would have to be sent to where the rest is.
    """

    def __init__(self, own: Callable[[str], bool] = lambda line: True) -> None:
        self.counts: Counter[str] = Counter()
        self._own = own
        self._stack = ExitStack()

    def __enter__(self) -> DeviceWaits:
        self._stack.enter_context(_Functions(self))
        self._stack.enter_context(_Operations(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def note(self, kind: str) -> None:
        line = caller()
        if self._own(line):
            self.counts[f"{kind} at {line}"] += 1


def caller() -> str:
    """The innermost line that is neither torch's nor of these helpers: `fish_tuning/scores/finite.py:16`."""
    for frame in reversed(traceback.extract_stack()):
        where = frame.filename
        if "/torch/" not in where and "contextlib" not in where and not where.endswith(("_waits.py", "_device.py")):
            return f"{'/'.join(where.split('/')[-3:])}:{frame.lineno}"
    return "?"


class _Operations(TorchDispatchMode):
    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = look(func, args, kwargs or {}) or (name_of(func) if name_of(func) in SENT else None)
        if kind is not None:
            self.waits.note(kind)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Sees what does nothing on a CPU: a tensor that is there already is neither copied nor waited for."""

    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TO_HOST or (func is Tensor.to and "cpu" in (*args[1:], *kwargs.values())):
            self.waits.note("copy to the host")
        if func in _MAKERS and kwargs.get("device") is None:
            self.waits.note("made on the host")
        return func(*args, **kwargs)
