"""Sparse training: a masked tensor becomes a frozen tensor plus a trainable vector of its selected entries.

The vector is the module's parameter, under the tensor's own name: optimizer, gradient clipping, DDP and every count by
`requires_grad` see k numbers and nothing else. A read of that name gives the whole tensor, which is there already: the
numbers are written into it once a step, not at every read. In the state dict the tensor keeps its name and shape.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fish_tuning.errors import MaskError
from fish_tuning.model_walks import every_module
from fish_tuning.sparse.adapter_names import adapters_of, check_adapter, idle_names
from fish_tuning.sparse.compiled_reads import read_compiled
from fish_tuning.sparse.copies import by_its_own_class, deep_copied, reduced
from fish_tuning.sparse.dense_state_dicts import (
    GROUP,
    STATE,
    loads_whole_tensors,
    own_memory,
    put_hooks,
    remove_hooks,
    with_stand_ins,
)
from fish_tuning.sparse.frozen_parts import FROZEN, is_split_up, keep_frozen_part, with_frozen_parts
from fish_tuning.sparse.groups import Group, small_groups
from fish_tuning.sparse.optimizer_steps import masked_modules, note_replaced
from fish_tuning.sparse.selected_gradients import backward_pass
from fish_tuning.sparse.sharding import full_shape, is_sharded, plain_name
from fish_tuning.sparse.taken_apart import (
    check_no_whole,
    class_below,
    keeping_parameters,
    takes_loaded,
    with_class_below,
    without_swapping,
)
from fish_tuning.sparse.whole_tensors import MaskedTensor

Mask = dict[str, Tensor]

_GONE = object()
_FSDP1 = "torch.distributed.fsdp._flat_param"
Methods = frozenset[tuple[str, Callable[..., Any]]]
_classes: dict[tuple[type[nn.Module], frozenset[str], Methods], type[nn.Module]] = {}
# Attribute of a module: the names and shapes of its trainable parameters that the mask left as they are.
LEFT_DENSE = "_fish_tuning_left_dense"


def get_mask(model: nn.Module, adapter_name: str | None = None) -> Mask:
    """The mask that is applied to `model`, dense trainable tensors included as all true; bool tensors by name.

    With `adapter_name`, that PEFT adapter's tensors alone, whether or not it is the active one.

    Raises MaskError when the model has no such adapter.
    """
    mask = {tensor.name: tensor.masked.selected() for tensor in masked_tensors(model)}
    shapes = left_dense_shapes(model)  # which an engine that splits the model may have taken away
    for name, parameter in dense_parameters(model).items():
        mask[name] = torch.ones(shapes.get(name, full_shape(parameter)), dtype=torch.bool, device=parameter.device)
    if adapter_name is None:
        return mask
    check_adapter(model, adapter_name)
    adapters = adapters_of(model, mask)
    return {name: selected for name, selected in mask.items() if adapters[name] == adapter_name}


def is_masked(model: nn.Module) -> bool:
    """Whether a mask is applied to any tensor of `model`."""
    return next(masked_tensors(model), None) is not None


def trains_masked(model: nn.Module) -> bool:
    """Whether any tensor that trains is masked; those of PEFT adapters that are not active do not."""
    return bool(trained_names(model))


def trained_names(model: nn.Module) -> set[str]:
    """The masked tensors that train now. One without a selected entry goes with the other tensors of its adapter."""
    flags = {t.name: None if t.masked.values is None else t.masked.values.requires_grad for t in masked_tensors(model)}
    if not flags:
        return set()
    adapters = adapters_of(model, flags)
    told = {adapters[name] for name, flag in flags.items() if flag is not None}
    training = {adapters[name] for name, flag in flags.items() if flag}
    untold = {name for name in flags if adapters[name] not in told}
    without_values = {name for name, flag in flags.items() if flag is None and adapters[name] in training}
    return {name for name, flag in flags.items() if flag} | without_values | (untold - idle_names(model, untold))


def mark_replaced(model: nn.Module) -> None:
    """Remember that entries outside the mask may have been trained, under an earlier one."""
    trained = trained_names(model)
    for tensor in masked_tensors(model):
        tensor.masked.replaced |= tensor.name in trained


def replaced_parameters(model: nn.Module) -> set[int]:
    """The ids of the dense parameters that masked tensors stand in for; no optimizer should hold them."""
    return {id(tensor.masked.dense) for tensor in masked_tensors(model)}


def dense_parameters(model: nn.Module, though_frozen: bool = False) -> dict[str, nn.Parameter]:
    """What trains as a whole: the trainable parameters that are no masked tensor's values.

    Those that a mask left dense stay among them while their PEFT adapter is not the active one, while nothing of the
    model trains (it is frozen for evaluation, or an average of weights), and `though_frozen`.
    """
    masked = {tensor.name for tensor in masked_tensors(model)}  # by name, since FSDP2 puts others for the values
    named = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    kept: Collection[str] = left_dense_shapes(model)
    if not though_frozen and any(parameter.requires_grad for parameter in named.values()):
        kept = idle_names(model, kept)
    return {n: p for n, p in named.items() if (p.requires_grad or n in kept) and n not in masked}


def left_dense_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The trainable parameters that masks left as they were, those of adapters that are not active too."""
    return {
        plain_name(f"{path}.{local}" if path else local): shape
        for path, module in model.named_modules()
        for local, shape in vars(module).get(LEFT_DENSE, {}).items()
    }


def count_trainable_parameters(model: nn.Module) -> int:
    """Number of entries that an optimizer would change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _masked_class(base: type[nn.Module], names: frozenset[str], methods: Methods) -> type[nn.Module]:
    """The class of a module whose tensors of these names are masked, with methods that do more then.

    It goes by the name of the module's own class.
    """
    key = base, names, methods
    if key not in _classes:
        _classes[key] = _made_class(base, names, methods)
    return _classes[key]


def _made_class(base: type[nn.Module], names: frozenset[str], methods: Methods) -> type[nn.Module]:
    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        for _, masked in _own_masked_tensors(self):
            masked.group.take_written()
        with without_swapping():
            result = base._apply(self, *args, **kwargs)  # some classes' own does not know of `recurse`
        fn = args[0] if args else kwargs["fn"]
        for local, masked in _own_masked_tensors(self):
            masked.move(fn, self._parameters.get(local))
            keep_frozen_part(self, local, masked)
        return result

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        for _, masked in _own_masked_tensors(self):
            masked.group.take_written()
        return reduced(self, (base, names, methods), protocol, _bare, _mask_again)

    def __deepcopy__(self: Any, memo: Any) -> Any:
        for _, masked in _own_masked_tensors(self):
            masked.group.take_written()
        return deep_copied(self, (base, names, methods), memo, _mask_again)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name.startswith(FROZEN):
            local, vars(self)[name] = name.removeprefix(FROZEN), value
            vars(self)[STATE + local].take_gathered(value, self._parameters.get(local))
            return
        masked = vars(self).get(STATE + name) if name in names else None
        if masked is None or not _set_in_place(self, name, value, masked, sys._getframe(1)):
            base.__setattr__(self, name, value)

    def named_parameters(self: Any, *args: Any, **kwargs: Any) -> Any:
        named, caller = base.named_parameters(self, *args, **kwargs), sys._getframe(1)
        if is_split_up(caller):
            return with_frozen_parts(self, named, _own_masked_tensors(self))
        return with_stand_ins(self, named) if loads_whole_tensors(caller) else named

    own: dict[str, Any] = {name: property(*_access(name)) for name in names}
    if base.forward is nn.Linear.forward and "weight" in names:
        own["forward"] = _linear_forward
    if names:
        own |= {"_apply": _apply, "__setattr__": __setattr__, "named_parameters": named_parameters}
        own |= keeping_parameters(base, names)
    own |= {"__reduce_ex__": __reduce_ex__, "__module__": base.__module__, "__qualname__": base.__qualname__}
    own |= {"_unmasked": base, "_masked": names, "_methods": methods, **dict(methods)}
    if hasattr(base, "__deepcopy__"):
        own["__deepcopy__"] = __deepcopy__
    if issubclass(base, torch.fx.GraphModule):
        own["recompile"] = by_its_own_class(base, "recompile")
    return type(base.__name__, (base,), own)


def _set_in_place(module: nn.Module, name: str, value: Any, masked: MaskedTensor, caller: FrameType) -> bool:
    """What setting a masked tensor's name does; False where that is what any module does."""
    if value is not None and masked.gives(value):
        return True  # it has what it is given
    if value is masked.values and value is not None and name not in module._parameters:
        masked.group.managed = True  # taken out and put back, as FSDP1 does
    if name not in module._parameters or not (value is None or isinstance(value, nn.Parameter)):
        return False
    if not takes_loaded(module, name, value, caller):
        # FSDP2's, for which torch would read the tensor to look whether it is there.
        masked.by_engine |= is_sharded(value)
        check_no_whole(module, name, value)
        module._parameters[name] = value
    return True


def _access(local: str) -> tuple[Any, Any, Any]:
    key, group_key = STATE + local, GROUP + local

    def read(self: Any) -> Any:
        own = self.__dict__
        masked = own[key]
        values = own["_parameters"].get(local, _GONE)
        if values is masked.values:
            group, tensor = own[group_key], masked.tensor
            if group.managed:
                return values
            if group.scattered:
                return masked.read_with(own["_parameters"][local])  # by which ZeRO-3 sees who needs it
            if is_dynamo_compiling():
                if hasattr(values, "_hp_mapping"):
                    # ZeRO changes the values after its optimizer's step, which a compiled model would not see.
                    raise MaskError("A masked model under DeepSpeed ZeRO-1 or ZeRO-2 cannot be compiled.")
                return read_compiled(masked)
            # This is done at every read, and what it looks at is mostly the group's, which the last read has just used.
            if not (group.settled and group.flat._version == group.seen and masked.plain._version == masked.written):
                tensor = masked.read()
            return masked.read_apart(tensor) if group.apart or backward_pass() != -1 else tensor
        if local in own:  # a copy that DataParallel made, or what FSDP1 has put there for a pass
            if not is_dynamo_compiling() and sys._getframe(1).f_globals.get("__name__") == _FSDP1:
                return own[local]  # it looks whether that is still its own
            return masked.read_with(own[local], copy=True)
        if values is None or values is _GONE:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {local!r}")
        return masked.read_other(values)

    def replace(self: Any, value: Any) -> None:
        self.__dict__[local] = value
        self.__dict__[key].note_dtype(value.dtype)

    def remove(self: Any) -> None:
        if self.__dict__.pop(local, _GONE) is _GONE:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {local!r}")

    return read, replace, remove


def _linear_forward(self: Any, input: Tensor) -> Tensor:
    """nn.Linear's, with an ordinary tensor where all is settled: torch takes one of another class later."""
    own = self.__dict__
    masked, parameters = own[STATE + "weight"], own["_parameters"]
    group = own[GROUP + "weight"]
    if (
        not is_dynamo_compiling()  # first, since torch.compile would guard what is looked at before
        and group.settled
        and parameters.get("weight", _GONE) is masked.values
        and group.flat._version == group.seen
        and masked.plain._version == masked.written
        and not (group.managed or group.scattered or group.apart)
        and backward_pass() == -1
    ):
        direct = "bias" in parameters and STATE + "bias" not in own
        return F.linear(input, masked.plain, parameters["bias"] if direct else self.bias)
    return nn.Linear.forward(self, input)


def masked_names(module: nn.Module) -> frozenset[str]:
    names: frozenset[str] = getattr(type(module), "_masked", frozenset())
    return names


def _own_masked_tensors(module: nn.Module) -> list[tuple[str, MaskedTensor]]:
    """A module's own masked tensors and their names in it."""
    names = masked_names(module)
    return [(local, vars(module)[STATE + local]) for local in module._parameters if local in names] if names else []


def _bare(base: type[nn.Module], names: frozenset[str], methods: Methods, *args: Any) -> nn.Module:
    """A masked module without anything in it, for copies and pickles."""
    cls = _masked_class(base, names, methods)
    return cls.__new__(cls, *args)


def _mask_again(module: nn.Module, names: frozenset[str], methods: Methods) -> None:
    """Make a masked module of a copy that has what is in one already, or is to get it."""
    _set_class(module, names, methods)
    for local in names:
        if STATE + local in vars(module):
            remove_hooks(module, local)
            put_hooks(module, local)


def masked_methods(module: nn.Module) -> Methods:
    """The methods of a module that do more while a mask is applied."""
    methods: Methods = getattr(type(module), "_methods", frozenset())
    return methods


def set_methods(module: nn.Module, methods: Methods) -> None:
    _set_class(module, masked_names(module), methods)


def _set_class(module: nn.Module, names: frozenset[str], methods: Methods) -> None:
    kind, below = type(module), class_below(module)
    base: type[nn.Module] = getattr(below, "_unmasked", below)
    new = _masked_class(base, names, methods) if names or methods else base
    module.__class__ = with_class_below(kind, below, new)
    if names:
        masked_modules[id(module)] = module


class NamedMaskedTensor(NamedTuple):
    """A masked tensor and where it is: `local` is its name in `module`, `name` that in the model."""

    name: str
    module: nn.Module
    local: str
    masked: MaskedTensor

    @property
    def frozen(self) -> Tensor:
        return self.masked.frozen


def mask_tensor(module: nn.Module, local: str, selected: Tensor) -> None:
    dense = module.get_parameter(local)
    masked = MaskedTensor(dense, selected)
    dense.data = dense.data.new_empty(0)  # `frozen` holds it now
    dense.grad = None
    note_replaced(dense, masked)
    vars(module)[STATE + local], vars(module)[GROUP + local] = masked, Group([masked])
    module._parameters[local] = masked.values
    _set_class(module, masked_names(module) | {local}, masked_methods(module))
    put_hooks(module, local)


def group_small(model: nn.Module) -> None:
    """Have neighbouring small tensors hand on their gradients in one go, which costs less than one by one."""
    tensors = list(masked_tensors(model))
    computed_in: dict[torch.dtype, torch.dtype] = {}
    for tensor in tensors:
        tensor.masked.computed_in = computed_in
    adapters = adapters_of(model, [tensor.name for tensor in tensors])
    keys = [
        None
        if tensor.masked.values is None
        else (adapters[tensor.name], tensor.frozen.dtype, tensor.frozen.device, tensor.frozen.dim() > 1)
        for tensor in tensors
    ]
    gpu = any(tensor.frozen.device.type not in ("cpu", "meta") for tensor in tensors)
    places = small_groups([tensor.frozen.numel() for tensor in tensors], keys, gpu)
    groups = [[tensors[place] for place in group] for group in places]
    for members in groups:
        group = Group([tensor.masked for tensor in members])
        for tensor in members:
            vars(tensor.module)[GROUP + tensor.local] = group
        if len(members) > 1 and not any(isinstance(tensor.masked.tensor, Tensor) for tensor in members):  # all new
            group.share_values()
            for tensor in members:
                tensor.module._parameters[tensor.local] = tensor.masked.values
        group.bind()  # now, because compiled models cannot


def unmask_tensor(tensor: NamedMaskedTensor, trains: bool) -> None:
    module, local, masked = tensor.module, tensor.local, tensor.masked
    trained = own_memory(masked.read().detach())
    remove_hooks(module, local)
    group: Group = vars(module).pop(GROUP + local)
    del vars(module)[STATE + local]
    group.take_apart()
    group.members.remove(masked)
    group.bind()
    _set_class(module, masked_names(module) - {local}, masked_methods(module))
    if masked.values is not None:
        note_replaced(masked.values, masked.dense)
    masked.dense.data = trained
    masked.dense.requires_grad_(trains)
    module._parameters[local] = masked.dense


def masked_tensors(model: nn.Module) -> Iterator[NamedMaskedTensor]:
    """Every masked tensor of `model`, by the name that it has without the mask."""
    if not any(hasattr(kind, "_masked") for kind in set(map(type, every_module(model)))):
        return
    for path, module in model.named_modules():
        for local, masked in _own_masked_tensors(module):
            yield NamedMaskedTensor(plain_name(f"{path}.{local}" if path else local), module, local, masked)
