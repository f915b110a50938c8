"""How masked modules are copied and pickled: as their own class says it, and masked again after that."""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from fish_tuning.errors import MaskError
from fish_tuning.sparse.dense_state_dicts import GROUP, STATE


def reduced(module: nn.Module, masks: Any, protocol: int, bare: Any, masked_again: Any) -> tuple[Any, ...]:
    """What a masked module is made again from: what its class `base` says, which may leave out what cannot be copied.

    `masks` are that class, the names of the masked tensors and the methods that do more. `bare(*masks, ...)` makes a
    masked module without anything in it, which takes a state; where the class makes its modules in a way of its own,
    `masked_again(module, names, methods)` makes a masked one of what that makes.
    """
    kind, (base, names, methods) = type(module), masks
    made, args, *rest = base.__reduce_ex__(module, max(protocol, 2))
    if names and not any(_has_masks(each, names) for each in (*args, *rest[:1])):
        raise _left_out(base)
    if made is copyreg.__newobj__:  # type: ignore[attr-defined]
        return (bare, (*masks, *args[1:]), *rest)
    args = tuple(base if each is kind else each for each in args)
    make = base if made is kind else made
    return (_remade, (masked_again, make, args, names, methods), *rest)


def deep_copied(module: nn.Module, masks: Any, memo: dict[int, Any], masked_again: Any) -> nn.Module:
    """A deep copy by the `__deepcopy__` of a module's own class, which sees a module as it knows it."""
    base, names, methods = masks
    made: nn.Module = by_its_own_class(base, "__deepcopy__")(module, memo)
    for name in names:
        for key in (STATE + name, GROUP + name):
            vars(made)[key] = copy.deepcopy(vars(module)[key], memo)
        if made._parameters.get(name) is not vars(made)[STATE + name].values:
            raise _left_out(base)
    masked_again(made, names, methods)
    return made


def by_its_own_class(base: Any, name: str) -> Callable[..., Any]:
    """A method of a masked module's own class, which finds a module of that class: torch.fx writes code into it."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        kind = type(self)
        self.__class__ = base
        try:
            return getattr(base, name)(self, *args, **kwargs)
        finally:
            self.__class__ = kind

    return method


def _remade(masked_again: Callable[..., None], make: Callable[..., Any], args: Iterable[Any], *masks: Any) -> Any:
    module = make(*args)
    masked_again(module, *masks)
    return module


def _has_masks(state: Any, names: Iterable[str]) -> bool:
    state = state[0] if isinstance(state, tuple) and state else state  # beside it, what is in slots
    return isinstance(state, dict) and all(STATE + name in state for name in names)


def _left_out(base: type[nn.Module]) -> MaskError:
    return MaskError(
        f"{base.__name__} copies and pickles its modules in a way of its own (__getstate__, __reduce__ or "
        "__deepcopy__) that leaves the masks of its tensors out. Copy the model before apply_mask, or have that take "
        "along what it does not know of the module's __dict__."
    )
