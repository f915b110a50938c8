"""What torch puts in the place of a module's tensors (parametrizations, pruning), or of the module (TorchScript).

A masked tensor cannot be taken apart: it is refused before anything is, with the layer as it was.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from fish_tuning.errors import MaskError
from fish_tuning.sparse.dense_state_dicts import STATE
from fish_tuning.sparse.optimizer_steps import CHECK_HELD
from fish_tuning.sparse.sharding import is_sharded

_TOOLS = "torch.nn.utils."
_LOADER = "transformers.core_model_loading"


@contextmanager
def without_swapping() -> Iterator[None]:
    """A module keeps its parameters when it is loaded or moved, where torch is set to swap them for others.

    Torch cannot swap what others refer to, as masked tensors do to their values.
    """
    swapping = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(False)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapping)


def keeping_parameters(base: Any, names: frozenset[str]) -> dict[str, Any]:
    """Methods of a module of class `base` with masked tensors, whose parameters nobody may put others for."""

    def _load_from_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        with without_swapping():
            base._load_from_state_dict(self, *args, **kwargs)

    def __delattr__(self: Any, name: str) -> None:
        _check_not_taken_apart(self, names, name, sys._getframe(1))
        base.__delattr__(self, name)

    def register_parameter(self: Any, name: str, param: Any) -> None:
        _check_not_taken_apart(self, names, name, sys._getframe(1))
        if name in names and STATE + name in vars(self):
            check_no_whole(self, name, param)
        base.register_parameter(self, name, param)

    def check_held(self: Any, held: set[int]) -> None:
        for local in names:
            masked, parameter = vars(self).get(STATE + local), self._parameters.get(local)
            if (
                masked is not None
                and id(parameter) in held
                and not (masked.by_engine or masked.group.managed or masked.group.scattered)
            ):
                check_no_whole(self, local, parameter, _PUT_BY_OTHERS)

    def parametrizations(self: Any) -> Any:
        # `register_parametrization` asks for them first. Before it deletes the tensor, `orthogonal` writes into it.
        asks = sys._getframe(1).f_back
        if asks is not None and asks.f_code.co_name == "register_parametrization":
            _check_not_taken_apart(self, names, asks.f_locals.get("tensor_name", ""), asks)
        return base.__getattr__(self, "parametrizations")

    methods: dict[str, Any] = {each.__name__: each for each in (_load_from_state_dict, __delattr__, register_parameter)}
    methods[CHECK_HELD] = check_held
    methods["parametrizations"] = property(parametrizations)
    methods |= {"_slow_forward": _as_torch_script, "__prepare_scriptable__": _as_torch_script}  # a trace, a script
    return methods | ({"is_tensor": property(_is_tensor)} if issubclass(base, ParametrizationList) else {})


def _check_not_taken_apart(module: nn.Module, names: frozenset[str], changed: str, frame: FrameType | None) -> None:
    """MaskError where it is torch's tools that delete a masked tensor, or add parameters to stand for it."""
    tool = "" if frame is None else str(frame.f_globals.get("__name__", ""))
    if not tool.startswith(_TOOLS):
        return
    for local in names:
        if changed == local or changed.startswith(f"{local}_"):
            module._parameters.setdefault(local, vars(module)[STATE + local].values)  # weight_norm has deleted it
            raise MaskError(
                f"{tool} would make something else of {local!r} of {type(module).__name__}, which has a mask: what "
                "trains is its selected entries. remove_mask(model) first; a mask of the model as it is then names "
                "the tensors that are there then."
            )


def takes_loaded(module: nn.Module, local: str, parameter: nn.Parameter | None, frame: FrameType) -> bool:
    """Whether transformers gives a masked tensor what it has loaded for it (`load_adapter(hotswap=True)`).

    It is written into the tensor then, as PEFT's own hotswap does.
    """
    of_shape = parameter is not None and parameter.shape == vars(module)[STATE + local].shape
    if not of_shape or is_sharded(parameter) or frame.f_globals.get("__name__") != _LOADER:
        return False
    with torch.no_grad():
        getattr(module, local).copy_(parameter)
    return True


_NEW = (
    "has a mask, and a new parameter in its place would train as a whole. Write into it (with torch.no_grad(): "
    "module.{local}.copy_(...)), or remove_mask(model) first and apply the mask again."
)
_PUT_BY_OTHERS = (
    "has a mask, and a whole parameter has been put in its place, past the module (accelerate's cpu_offload, "
    "disk_offload and set_module_tensor_to_device do so): all of it would train. mask = get_mask(model), "
    "remove_mask(model), which gives the tensor as it was before, and apply_mask(model, mask) again, then make the "
    "optimizer."
)


def check_no_whole(module: nn.Module, local: str, parameter: nn.Parameter | None, found: str = _NEW) -> None:
    """MaskError for a whole tensor in the place of a masked one's values: all of it would train, with the mask told.

    And for None, which takes the tensor away.
    """
    masked = vars(module)[STATE + local]
    if parameter is None:
        module._parameters.setdefault(local, masked.values)  # it may be deleted first
        raise MaskError(
            f"{local!r} of {type(module).__name__} has a mask, and None in its place would take it away. "
            "remove_mask(model) first; a mask of the model as it is then names the tensors that are there then."
        )
    if is_sharded(parameter) or parameter.shape != masked.shape:
        return
    if masked.num_selected < parameter.numel():
        raise MaskError(f"{local!r} of {type(module).__name__} {found.format(local=local)}")


def _as_torch_script(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    raise MaskError(
        f"TorchScript (torch.jit.trace, torch.jit.script) was asked for a {type(self).__name__} that has a mask, "
        "which it does not know of. remove_mask(model) first, which leaves the tensors as they are now; torch.compile "
        "and torch.export take the model as it is."
    )


def _is_tensor(self: Any) -> bool:
    """In the place of ParametrizationList's attribute, which `remove_parametrizations` asks before it does anything."""
    if sys._getframe(1).f_code.co_name == "remove_parametrizations":
        raise MaskError(
            "The parametrization has a mask, which would be lost with it: remove_mask(model) before "
            "remove_parametrizations."
        )
    return bool(vars(self)["is_tensor"])


def class_below(module: nn.Module) -> type[nn.Module]:
    """The class of a module that is masked, or to be: its own, but for what torch puts above it for parametrizations.

    Torch takes that off again from the top.
    """
    kind = type(module)
    for each in kind.__mro__:
        if "_unmasked" in vars(each):
            return each
    return kind.__bases__[0] if is_parametrized(module) else kind


def with_class_below(kind: Any, old: type[nn.Module], new: type[nn.Module]) -> type[nn.Module]:
    """The class `kind` with another class in the place of one that it derives from, or is."""
    if kind is old:
        return new
    bases = tuple(with_class_below(base, old, new) if issubclass(base, old) else base for base in kind.__bases__)
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    made: type[nn.Module] = type(kind)(kind.__name__, bases, own)
    return made
