"""FSDP2's (`fully_shard`) own record of a model: which group gathers which parameter, and masks in their place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fish_tuning.errors import FishTuningError
from fish_tuning.sparse.dense_state_dicts import STATE
from fish_tuning.sparse.frozen_parts import FROZEN, frozen_part
from fish_tuning.sparse.optimizer_steps import hand_on_replaced
from fish_tuning.sparse.sharding import plain_name, whole

# What a group remembers of its parameters, since torch 2.15.
_ORDER, _WIDER = "_reduce_scatter_param_indices", "_fsdp_params_with_wider_grad_dtype"


def state_of(module: nn.Module) -> Any:
    """FSDP2's record of a module that it was called on; None for others."""
    get = getattr(type(module), "_get_fsdp_state", None)  # a module's own `getattr` raises, in Python
    return get(module) if get is not None else None


def roots_of(model: nn.Module) -> list[Any]:
    """The outermost modules that `fully_shard` was called on."""
    found: list[Any] = []

    def look(module: nn.Module) -> None:
        if state_of(module) is not None:
            found.append(module)
            return
        for child in module.children():
            look(child)

    look(model)
    return found


def groups_of(model: nn.Module) -> Iterator[Any]:
    """FSDP's groups of parameters, which it gathers together."""
    seen: set[int] = set()
    for module in model.modules():
        state = state_of(module)
        if state is None:
            continue
        several = getattr(state, "_fsdp_param_groups", None)  # before torch 2.13 there was one
        for group in [state._fsdp_param_group] if several is None else list(several):
            if group is not None and id(group) not in seen:
                seen.add(id(group))
                yield group


def fsdp_parameters(model: nn.Module) -> dict[int, Any]:
    """FSDP's records of what it alone has split, by the id of the parameter."""
    every = (each for group in groups_of(model) for each in group.fsdp_params)
    return {id(each.sharded_param): each for each in every if not each.is_dtensor}  # which tensor parallelism has made


def reshard(model: nn.Module) -> None:
    """Each process has its part alone, of whatever was gathered."""
    for module in model.modules():
        if state_of(module) is not None:
            module.reshard()  # type: ignore[operator]


def check_no_gradients(parameters: Iterable[Any], doing: str, kind: type[FishTuningError]) -> None:
    """An error of this kind where FSDP's records of parameters hold gradients of an unfinished step."""
    for each in parameters:
        unsharded: Tensor | None = getattr(each, "_unsharded_param", None)
        if each.unsharded_accumulated_grad is not None or (unsharded is not None and unsharded.grad is not None):
            raise kind(
                f"{each._param_fqn!r} holds a gradient that FSDP has not reduced (set_requires_gradient_sync(False)). "
                f"{doing} before or after the accumulation of a step, not within."
            )


@contextmanager
def other_parameters(group: Any, parameters: list[Any]) -> Iterator[None]:
    """A group that has some of its parameters alone, until this is left."""
    kept = {name: getattr(group, name) for name in ("fsdp_params", _ORDER, _WIDER) if hasattr(group, name)}
    group.fsdp_params = parameters
    if _ORDER in kept:
        group._init_reduce_scatter_param_order()
        setattr(group, _WIDER, [each for each in kept[_WIDER] if each in parameters])
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(group, name, value)


@contextmanager
def sharded_again(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Of these tensors, those that FSDP2 has are whole until this is left; what is then in their places is sharded.

    A place that is left without a parameter leaves its group. All processes must enter this.
    """
    own: dict[int, tuple[nn.Module, str]] = {}
    for prefix, module in model.named_modules():
        for local, parameter in module._parameters.items():
            if parameter is not None and plain_name(f"{prefix}.{local}" if prefix else local) in names:
                own[id(parameter)] = module, local
    taken = [
        (group, each, *own[id(each.sharded_param)])
        for group in groups_of(model)
        for each in group.fsdp_params
        if id(each.sharded_param) in own
    ]
    if taken:
        reshard(model)
    gathered = []
    for _, each, module, local in taken:
        dense = whole(each.sharded_param.detach()).clone()
        gathered.append(nn.Parameter(dense, requires_grad=each.sharded_param.requires_grad))
        module._parameters[local] = gathered[-1]
    yield
    for (group, each, module, local), dense in zip(taken, gathered, strict=True):
        hand_on_replaced(dense, each.sharded_param)
        each._post_load_hook_handle.remove()
        place = group.fsdp_params.index(each)
        group.fsdp_params[place : place + 1] = [
            _like(each, name, parameter, group) for name, parameter in _in_its_place(module, local)
        ]
    for group in {id(group): group for group, *_ in taken}.values():
        if not group.fsdp_params:
            _forget(model, group)
        elif hasattr(group, "_reduce_dtype"):  # which the first pass sets
            group._init_mp_dtypes()
            if hasattr(group, _ORDER):
                group._init_reduce_scatter_param_order()


def _in_its_place(module: nn.Module, local: str) -> Iterator[tuple[str, nn.Parameter]]:
    """What a module has in the place of a parameter: the parameter, or of a masked tensor its values and the rest."""
    masked = vars(module).get(STATE + local)
    if (parameter := module._parameters.get(local)) is not None:
        yield local, parameter
    if masked is not None and (part := frozen_part(module, local, masked)) is not None:
        yield FROZEN + local, part


def _like(each: Any, name: str, parameter: nn.Parameter, group: Any) -> Any:
    """FSDP's record of another parameter in the same module; it shards it."""
    made = type(each)(
        parameter,
        type(each._module_info)(each._module_info.module, name),
        each.mesh_info,
        each.post_forward_mesh_info,
        each.device,
        None,
        each.mp_policy,
        group.offload_policy,
    )
    made._param_fqn = each._param_fqn
    return made


def _forget(model: nn.Module, group: Any) -> None:
    """A group without parameters has nothing to gather."""
    for module in model.modules():
        state = state_of(module)
        if state is None:
            continue
        if getattr(state, "_fsdp_param_groups", None) is not None:
            state._fsdp_param_groups[:] = [each for each in state._fsdp_param_groups if each is not group]
        elif state._fsdp_param_group is group:
            state._fsdp_param_group = None
