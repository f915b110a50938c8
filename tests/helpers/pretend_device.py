"""A device for machines that have none: tensors of the CPU that say they are elsewhere, and are treated so.

`with Pretending() as device:` makes torch know a device `pretend`. A product of its tensors with the CPU's is an error,
as on a GPU, and `device.counts` has each copy from one to the other and each look at a value, with the line that asked.
`device.copies` are copies that nothing waits for.

torch has one such device a process, and takes it for its accelerator from then on: only for processes of their own.
Tensors are wrapped, which subclasses with memory of their own, as masked tensors are, do not bear; nor can a model
that is there take another dtype, or one that comes keep its weights tied.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from device_waits import INDEXING, caller, look, name_of
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

CPU = torch.device("cpu")


class _Backend:
    """What torch asks of a device's module."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("pretend", backend_module=_Backend())
DEVICE = torch.device("pretend", 0)


class OnDevice(Tensor):
    """A tensor of the CPU, `held`, that says it is on the device."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, held: Tensor) -> OnDevice:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()} if not held.is_sparse else {}
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, dtype=held.dtype, device=DEVICE, layout=held.layout, **layout
        )
        made.held = held
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _on_cpu(func, args, kwargs or {}, Pretending.now)

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a tensor of a device has no NumPy array; copy it to the CPU first")

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"OnDevice({self.held!r})"


class Pretending(TorchDispatchMode):
    """While it is open, tensors can be made on, and moved to, the device."""

    now: Pretending | None = None

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.has_float64 = True
        self._data = _FromData()

    def __enter__(self) -> Pretending:
        Pretending.now = self
        self._data.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._data.__exit__(*error)
        Pretending.now = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _on_cpu(func, args, kwargs or {}, self)


class _FromData(TorchFunctionMode):
    """Tensors of Python data are made on the CPU and sent, which torch does where no mode sees it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == DEVICE.type:
            return func(*args, **{**kwargs, "device": CPU}).to(device)
        return func(*args, **kwargs)


def _on_cpu(func: Any, args: Any, kwargs: Any, mode: Pretending | None) -> Any:
    name, given = name_of(func), tree_leaves((args, kwargs))
    there = [each for each in given if isinstance(each, OnDevice)]
    here = [each for each in given if isinstance(each, Tensor) and not isinstance(each, OnDevice)]
    asked = kwargs.get("device")
    goes_there = bool(there) if asked is None else torch.device(asked).type == DEVICE.type
    if name == "copy_":
        goes_there = isinstance(args[0], OnDevice)
    elif there and name not in INDEXING and any(each.dim() for each in here):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {DEVICE} and cpu")
    if mode is not None:
        _note(mode, func, args, kwargs, there, here, goes_there)
    if asked is not None:
        kwargs = {**kwargs, "device": CPU}
    found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if not goes_there:
        return found
    same = {id(each.held): each for each in there}

    def told(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dtype == torch.float64 and mode is not None and not mode.has_float64:
            raise TypeError(f"{func}: the device has no float64")
        return same[id(value)] if id(value) in same else OnDevice(value)  # in place: the very tensor

    return tree_map(told, found)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


def _note(
    mode: Pretending, func: Any, args: Any, kwargs: Any, there: list[Any], here: list[Any], goes_there: bool
) -> None:
    name = name_of(func)
    moves = name == "_to_copy" and goes_there != bool(there)
    if moves or (name == "copy_" and there and here):
        if goes_there and (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))):
            mode.copies[f"copy to the device at {caller()}"] += 1
        else:
            mode.counts[f"copy to the {'device' if goes_there else 'host'} at {caller()}"] += 1
    elif there and here and name in INDEXING and any(each.dim() for each in here):
        mode.counts[f"{name} by positions on the host at {caller()}"] += 1
    elif there and (kind := look(func, args, kwargs)) is not None:
        mode.counts[f"{kind} at {caller()}"] += 1
