"""FSDP2 (`fully_shard`): its groups of parameters forget what trains for a while, and gather the rest as ever."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.errors import FisherError
from fish_tuning.sparse.sharding import FSDP2, whole


class Fsdp2:
    """What scoring asks of it."""

    name = FSDP2

    def gathers(self, module: nn.Module) -> bool:
        """Whether `fully_shard` has been called on the module or a part of it."""
        return any(_state_of(each) is not None for each in module.modules())

    @contextmanager
    def only_frozen(self, model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
        """Whole copies of what trains, in the dtype that it computes in."""
        roots = _roots(model)
        for root in roots:
            _state_of(root)._lazy_init()  # it goes by what trains, so it comes before that is taken out
        _reshard(model)
        with ExitStack() as stack:
            try:
                dtypes = _take_out(model, {id(each) for each in trained}, stack)
                yield [whole(each.detach()).clone().to(dtypes.get(id(each), each.dtype)) for each in trained]
            except BaseException:
                for root in roots:
                    if hasattr(root, "reset_iter_state"):  # newer versions of torch
                        root.reset_iter_state()
                raise
            finally:
                _reshard(model)


def _take_out(model: nn.Module, trained: set[int], stack: ExitStack) -> dict[int, torch.dtype]:
    """Takes what trains out of the groups until the stack closes; gives all dtypes that they compute in."""
    dtypes: dict[int, torch.dtype] = {}
    for group in _groups(model):
        own = {id(each.sharded_param): each for each in group.fsdp_params}
        dtypes |= {key: each.param_dtype or each.orig_dtype for key, each in own.items()}
        left = [each for key, each in own.items() if key not in trained]
        if len(left) < len(own):
            _check_no_gradients(own[key] for key in own.keys() & trained)
            stack.callback(setattr, group, "fsdp_params", group.fsdp_params)
            group.fsdp_params = left
        if not left:
            group.unshard = _nothing
            stack.callback(delattr, group, "unshard")
    return dtypes


def _nothing(*_: Any, **__: Any) -> None:
    """Of a group that is all taken out, there is nothing to gather."""


def _check_no_gradients(parameters: Iterable[Any]) -> None:
    for each in parameters:
        unsharded: Tensor | None = getattr(each, "_unsharded_param", None)
        if each.unsharded_accumulated_grad is not None or (unsharded is not None and unsharded.grad is not None):
            raise FisherError(
                f"{each._param_fqn!r} holds a gradient that FSDP has not reduced (set_requires_gradient_sync(False)). "
                "Score before or after the accumulation of a step, not within."
            )


def _state_of(module: nn.Module) -> Any:
    """FSDP2's record of a module that it was called on; None for others."""
    get = getattr(module, "_get_fsdp_state", None)
    return get() if get is not None else None


def _roots(model: nn.Module) -> list[Any]:
    """The outermost modules that `fully_shard` was called on."""
    found: list[Any] = []

    def look(module: nn.Module) -> None:
        if _state_of(module) is not None:
            found.append(module)
            return
        for child in module.children():
            look(child)

    look(model)
    return found


def _groups(model: nn.Module) -> Iterator[Any]:
    """FSDP's groups of parameters, which it gathers together."""
    seen: set[int] = set()
    for module in model.modules():
        state = _state_of(module)
        if state is None:
            continue
        several = getattr(state, "_fsdp_param_groups", None)  # before torch 2.13 there was one
        for group in [state._fsdp_param_group] if several is None else several:
            if group is not None and id(group) not in seen:
                seen.add(id(group))
                yield group


def _reshard(model: nn.Module) -> None:
    for module in model.modules():
        if _state_of(module) is not None:
            module.reshard()  # type: ignore[operator]
