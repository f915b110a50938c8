"""Sparse training: a masked tensor becomes a frozen tensor plus a trainable vector of its selected entries.

The vector is the module's parameter, under the tensor's own name: optimizer, gradient clipping, DDP and every count by
`requires_grad` see k numbers and nothing else. A read of that name gives the whole tensor, which is there already: the
numbers are written into it once a step, not at every read. In the state dict the tensor keeps its name and shape.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from fish_tuning.sparse.adapter_names import adapters_of, check_adapter, idle_names

Mask = dict[str, Tensor]

_STATE = "_fish_tuning_masked_tensors"  # attribute of a module: {local name: MaskedTensor}
# A tensor of more entries is a group of its own: there, the entries cost more than the call that gathers them.
_SMALL = 2**16
_AT_ONCE = 2**62
_GONE = object()
_LAYER = re.compile(r".*\.\d+(?=\.)")
_classes: dict[tuple[type[nn.Module], frozenset[str]], type[nn.Module]] = {}
_steps = [0]  # of all optimizers of the process: what was read before one may be out of date after it
_of_values: weakref.WeakValueDictionary[int, MaskedTensor] = weakref.WeakValueDictionary()
# Attribute of a module: the names of its trainable parameters that the mask left as they are.
LEFT_DENSE = "_fish_tuning_left_dense"


def get_mask(model: nn.Module, adapter_name: str | None = None) -> Mask:
    """The mask that is applied to `model`, dense trainable tensors included as all true; bool tensors by name.

    With `adapter_name`, that PEFT adapter's tensors alone, whether or not it is the active one.

    Raises MaskError when the model has no such adapter.
    """
    mask = {tensor.name: tensor.masked.selected() for tensor in masked_tensors(model)}
    for name, parameter in dense_parameters(model).items():
        mask[name] = torch.ones_like(parameter, dtype=torch.bool, requires_grad=False)
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


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains as a whole: the trainable parameters that are no masked tensor's values.

    Those that a mask left dense stay among them while their PEFT adapter is not the active one.
    """
    values = {id(tensor.masked.values) for tensor in masked_tensors(model)}
    idle = idle_names(model, left_dense_names(model))
    return {n: p for n, p in model.named_parameters() if (p.requires_grad or n in idle) and id(p) not in values}


def left_dense_names(model: nn.Module) -> set[str]:
    """The trainable parameters that masks left as they were, those of adapters that are not active too."""
    return {
        f"{path}.{local}" if path else local
        for path, module in model.named_modules()
        for local in vars(module).get(LEFT_DENSE, ())
    }


def entries_digest(entries: Tensor) -> str:
    """`dtype:sha256` of the entries' own bytes; empty for a tensor without data (on the meta device)."""
    if entries.is_meta:
        return ""
    stored = entries.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    return f"{str(entries.dtype).removeprefix('torch.')}:{hashlib.sha256(stored.data).hexdigest()}"


def count_trainable_parameters(model: nn.Module) -> int:
    """Number of entries that an optimizer would change."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


_DATA: Any = torch.Tensor.data


class _Watched(Tensor):
    """A tensor that also counts what is done to it through `.data`, which autograd does not."""

    # What is computed of it is an ordinary tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        increment_version(self)
        plain: Tensor = _DATA.__get__(self)
        return plain

    @data.setter
    def data(self, value: Tensor) -> None:
        increment_version(self)
        _DATA.__set__(self, value)


class _Values(_Watched, nn.Parameter):
    """The selected entries: of a vector (k,), of a tensor of more dimensions (k, 1).

    Optimizers tell matrices from vectors by that, as LoRA+ does and some rules for weight decay.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Values, (_DATA.__get__(self), self.requires_grad)


class MaskedTensor:
    """One masked tensor: the trainable `values`, where they belong, and the whole tensor that reads give.

    `values` is the module's parameter, under the tensor's own name. Whoever reads that name gets `tensor`, which
    shares its memory with `frozen` and hands its gradient at the selected entries on to `values`. The values are
    written into it after every step of an optimizer, and when a read finds that they have changed otherwise.
    """

    replaced = False  # whether another mask stood here before, whose entries were trained too

    def __init__(self, dense: nn.Parameter, selected: Tensor) -> None:
        index = selected.flatten().nonzero()[:, 0].to(dense.device)
        entries = dense.detach().take(index)
        self.index = index.to(torch.int32) if dense.numel() < 2**31 else index
        self.shape = dense.shape
        self.dense = dense  # the object that an unmasked model gets back
        self.digest = entries_digest(entries)  # of the entries before training: tells a delta's base from others
        entries = entries if dense.dim() == 1 else entries[:, None]
        self.values: nn.Parameter | None = _Values(entries) if len(index) else None
        self.frozen = dense.detach().contiguous()
        self.hooks: tuple[RemovableHandle, ...] = ()
        self.group = _Group([self])
        self.tensor: Tensor | None = None  # what reads give
        self.plain: Tensor | None = None  # the same for compiled models, which take no tensors of other classes
        self.trains = False  # whether `tensor` has a gradient
        self.seen = self.step = self.written = -1

    def read(self) -> Tensor:
        """The whole tensor, whatever has happened to it or to the values."""
        if self.tensor is None:
            self.group.bind()
        if self.values is not None and not is_dynamo_compiling():
            if self.values.requires_grad is not self.trains:
                self.group.bind()
            self.group.write()
        tensor = self.plain if is_dynamo_compiling() else self.tensor
        assert tensor is not None
        return tensor

    def take_entries(self) -> None:
        """Somebody wrote into the tensor itself, so its entries are the values now."""
        assert self.values is not None
        assert self.tensor is not None
        if self.tensor.data_ptr() != self.frozen.data_ptr():  # or put another memory in its place
            self.frozen.data.copy_(_DATA.__get__(self.tensor))
            _DATA.__set__(self.tensor, self.frozen)
        self.values.copy_(self.frozen.view(-1).index_select(0, self.index).view_as(self.values))

    def read_with(self, values: Any) -> Any:
        """What a read gives while something else stands in the place of the values, as sharding engines have it."""
        if not isinstance(values, Tensor) or values.numel() != len(self.index) or hasattr(values, "full_tensor"):
            return values  # another parameter, or a part of it on each device, which FSDP wants to see as it is
        index, frozen = self.index.to(values.device), self.frozen.to(values.device)
        frozen.data.view(-1).index_copy_(0, index.long(), values.detach().flatten().to(frozen.dtype))
        return _Selected.apply([index], None, [frozen], values)[0]  # type: ignore[no-untyped-call]

    def dense_of(self, values: Any) -> Tensor:
        """The whole tensor with these values, in memory of its own."""
        values = values.full_tensor() if hasattr(values, "full_tensor") else values
        dense = self.frozen.detach().clone()
        dense.view(-1).index_copy_(0, self.index.long(), values.detach().flatten().to(dense))
        return dense

    def move(self, change: Any, values: nn.Parameter | None) -> None:
        """Follow the module to another device or dtype, where its parameter is `values`."""
        self.frozen = change(self.frozen).contiguous()
        self.index = self.index.to(change(self.index).device)  # its numbers stay, even where memory is given up
        self.values = values
        self.group.bind()

    def selected(self) -> Tensor:
        selected = torch.zeros(self.shape, dtype=torch.bool, device=self.index.device)
        selected.view(-1)[self.index.long()] = True
        return selected

    def __getstate__(self) -> dict[str, Any]:
        """Without the tensor of reads, which is made again: a tensor with a history cannot be copied."""
        return {**vars(self), "tensor": None, "plain": None}


class _Group:
    """Masked tensors that are written, and hand on their gradients, in one go.

    Small ones of a layer are, and share memory for it; a large one is alone in its group.
    """

    def __init__(self, members: list[MaskedTensor]) -> None:
        self.members = members
        self.joined: tuple[Tensor, Tensor] | None = None  # the memory that all share, and the selected entries in it
        for member in members:
            member.group = self

    def bind(self) -> None:
        """Make the tensors that reads give; each lasts until its parameter moves, thaws or freezes."""
        self._join()
        for member in self.members:
            member.trains = member.values is not None and member.values.requires_grad
        for member, tensor, plain in zip(self.members, self._tensors(), self._tensors(), strict=True):
            tensor.__class__ = _Watched
            member.tensor, member.plain, member.written = tensor, plain, tensor._version
            if member.values is not None:
                _of_values[id(member.values)] = member
        self.write()

    def _tensors(self) -> list[Tensor]:
        """The members' whole tensors, in their memory; the gradient of those that train goes to the values."""
        tensors = [member.frozen.detach() for member in self.members]
        training = [(place, member) for place, member in enumerate(self.members) if member.trains]
        if training:
            joined = self.joined[1] if self.joined is not None and len(training) == len(tensors) else None
            indices, frozen = [each.index for _, each in training], [each.frozen for _, each in training]
            with torch.inference_mode(False), torch.enable_grad():
                made = _Selected.apply(indices, joined, frozen, *[each.values for _, each in training])  # type: ignore[no-untyped-call]
            # Autograd runs what was made last first; this is to run as soon as it can, and let dense gradients go.
            made[0].grad_fn._set_sequence_nr(_AT_ONCE)
            for (place, _), tensor in zip(training, made, strict=True):
                tensors[place] = tensor
        return tensors

    def write(self) -> None:
        """Write the values into the tensors.

        Past autograd, which need not see a change of what it saved where an optimizer has stepped since.
        """
        members = [member for member in self.members if member.values is not None]
        with torch.no_grad():
            for member in members:
                if member.tensor._version != member.written:  # type: ignore[union-attr]
                    member.take_entries()
                    member.written = member.tensor._version  # type: ignore[union-attr]
            if self.joined is not None:
                memory, index = self.joined
                values = torch.cat([member.values for member in members])  # type: ignore[misc]
                memory.index_copy_(0, index.long(), values.view(-1).to(memory.dtype))
            else:
                for member in members:
                    values = member.values.detach().view(-1).to(member.frozen.dtype)  # type: ignore[union-attr]
                    member.frozen.data.view(-1).index_copy_(0, member.index.long(), values)
        for member in members:
            member.seen, member.step = member.values._version, _steps[0]  # type: ignore[union-attr]

    def _join(self) -> None:
        """Put the tensors into one memory, unless they are there, or cannot be."""
        tensors = [member.frozen for member in self.members]
        if len(tensors) < 2 or len({(tensor.dtype, tensor.device) for tensor in tensors}) > 1:
            self.joined = None
            return
        memories = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        if self.joined is not None and memories == {self.joined[0].untyped_storage().data_ptr()}:
            return
        starts = list(itertools.accumulate((tensor.numel() for tensor in tensors), initial=0))
        memory = tensors[0].new_empty(starts[-1])
        for member, start in zip(self.members, starts, strict=False):
            place = memory[start : start + member.frozen.numel()].view(member.shape)
            member.frozen = place.copy_(member.frozen).data  # with a count of changes of its own
        index = torch.cat([member.index + start for member, start in zip(self.members, starts, strict=False)])
        self.joined = memory, index


class _Selected(torch.autograd.Function):
    """Whole tensors, of which only the selected entries have a gradient, that of `values`.

    It saves nothing of a forward pass, so one node serves every pass: what it computes depends on positions alone.
    """

    @staticmethod
    def forward(
        ctx: Any, indices: list[Tensor], joined: Tensor | None, frozen: list[Tensor], *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.indices, ctx.joined, ctx.shapes = indices, joined, [tensor.shape for tensor in values]
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in frozen)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if ctx.joined is not None and all(grad is not None for grad in grads):
            entries = torch._utils._flatten_dense_tensors(grads).index_select(0, ctx.joined)
            shapes = ctx.shapes
            return (None, None, None, *entries.view(-1, *shapes[0][1:]).split([shape[0] for shape in shapes]))
        return (None, None, None, *map(_gathered, grads, ctx.indices, ctx.shapes))


def _gathered(grad: Tensor | None, index: Tensor, shape: torch.Size) -> Tensor | None:
    if grad is None:
        return None
    # take() reads any layout in place, where reshape(-1) would copy the whole gradient; index_select is faster.
    flat = grad.view(-1).index_select(0, index) if grad.is_contiguous() else grad.take(index.long())
    return flat.view(shape)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    """After every step of every optimizer of the process."""
    groups = {
        masked.group
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (masked := _of_values.get(id(parameter))) is not None and masked.values is parameter
    }
    if not groups:  # an engine's own copy of the parameters may have been changed
        _steps[0] += 1
    for group in groups:
        group.write()  # now, because compiled models do not look whether they are out of date


register_optimizer_step_post_hook(_after_step)


def _masked_class(base: type[nn.Module], names: frozenset[str]) -> type[nn.Module]:
    """The class of a module whose tensors of these names are masked; it goes by the name of its own class."""
    if (base, names) not in _classes:
        _classes[base, names] = _made_class(base, names)
    return _classes[base, names]


def _made_class(base: type[nn.Module], names: frozenset[str]) -> type[nn.Module]:
    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        result = base._apply(self, fn, recurse)
        for local, masked in vars(self)[_STATE].items():
            masked.move(fn, self._parameters.get(local))
        return result

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return _bare, (base, names), vars(self)

    own: dict[str, Any] = {name: property(*_access(name)) for name in names}
    own |= {"_apply": _apply, "__reduce_ex__": __reduce_ex__, "__module__": base.__module__, "_unmasked": base}
    return type(base.__name__, (base,), own)


def _access(local: str) -> tuple[Any, Any]:
    def read(self: Any) -> Any:
        own = self.__dict__
        masked = own[_STATE][local]
        values = own["_parameters"].get(local, _GONE)
        if values is masked.values:
            tensor = masked.tensor
            # All in one place: this is done at every read, some hundred nanoseconds each.
            if (
                tensor is not None
                and not is_dynamo_compiling()
                and (
                    values is None
                    or (
                        values._version == masked.seen
                        and tensor._version == masked.written
                        and masked.step == _steps[0]
                        and values.requires_grad is masked.trains
                    )
                )
            ):
                return tensor
            return masked.read()
        if local in own:  # a copy that DataParallel made
            return masked.read_with(own[local])
        if values is None or values is _GONE:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {local!r}")
        return masked.read_with(values)

    def replace(self: Any, value: Any) -> None:
        self.__dict__[local] = value

    return read, replace


def _bare(base: type[nn.Module], names: frozenset[str]) -> nn.Module:
    """A masked module without anything in it, for copies and pickles."""
    cls = _masked_class(base, names)
    return cls.__new__(cls)


def _set_names(module: nn.Module, names: Iterable[str]) -> None:
    base = getattr(type(module), "_unmasked", type(module))
    wanted = frozenset(names)
    module.__class__ = _masked_class(base, wanted) if wanted else base


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
    states = vars(module).setdefault(_STATE, {})
    states[local] = masked
    module._parameters[local] = masked.values
    _set_names(module, states)
    masked.hooks = (
        module.register_state_dict_post_hook(_DenseStateDict(local)),
        module.register_load_state_dict_pre_hook(_SplitStateDict(local)),
        module.register_load_state_dict_post_hook(_TakeLoaded(local)),
    )


def group_by_layers(model: nn.Module) -> None:
    """Have the small tensors of a layer hand on their gradients in one go, which costs less than one by one."""
    groups: dict[Any, list[MaskedTensor]] = {}
    tensors = list(masked_tensors(model))
    adapters = adapters_of(model, [tensor.name for tensor in tensors])
    for tensor in tensors:
        layer, dense = _LAYER.match(tensor.name), tensor.frozen
        key: Any = tensor.name
        if layer and dense.numel() <= _SMALL and tensor.masked.values is not None:
            key = layer[0], adapters[tensor.name], dense.dtype, dense.device, dense.dim() > 1
        groups.setdefault(key, []).append(tensor.masked)
    for group in groups.values():
        _Group(group).bind()  # now, because compiled models cannot


def unmask_tensor(tensor: NamedMaskedTensor, trains: bool) -> None:
    module, local, masked = tensor.module, tensor.local, tensor.masked
    trained = _own_memory(masked.read().detach())
    for hook in masked.hooks:
        hook.remove()
    states = vars(module)[_STATE]
    del states[local]
    masked.group.members.remove(masked)
    masked.group.joined = None
    masked.group.bind()
    _set_names(module, states)
    if not states:
        del vars(module)[_STATE]
    masked.dense.data = trained
    masked.dense.requires_grad_(trains)
    module._parameters[local] = masked.dense


def _own_memory(tensor: Tensor) -> Tensor:
    """The tensor; a copy where it shares memory with others, which code that saves tensors would take for one."""
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


class _DenseStateDict:
    """State-dict hook of the owning module: gives the tensor under its own name, in its own shape."""

    def __init__(self, local: str) -> None:
        self.local = local

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        masked: MaskedTensor = vars(module)[_STATE][self.local]
        if self.local not in module._parameters:  # PEFT deleted the adapter
            return
        stored = state_dict.get(prefix + self.local)
        if stored is None or module._parameters.get(self.local) is masked.values:
            state_dict[prefix + self.local] = _own_memory(masked.read().detach())
        elif stored.numel() == len(masked.index):
            state_dict[prefix + self.local] = masked.dense_of(stored)


class _SplitStateDict:
    """Load hook of the owning module: takes the dense tensor apart into the frozen one and the values."""

    def __init__(self, local: str) -> None:
        self.local = local

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        masked: MaskedTensor = vars(module)[_STATE][self.local]
        dense = state_dict.get(prefix + self.local)
        if not isinstance(dense, Tensor) or dense.shape != masked.shape or self.local not in module._parameters:
            return  # torch says what does not fit
        if masked.frozen.is_meta:
            masked.frozen = dense.detach().clone(memory_format=torch.contiguous_format)
            masked.group.bind()
        else:
            masked.frozen.data.copy_(dense)
        if masked.values is None:
            del state_dict[prefix + self.local]
        else:
            entries = dense.detach().flatten()[masked.index.to(dense.device).long()]
            state_dict[prefix + self.local] = entries.view(masked.values.shape)


class _TakeLoaded:
    """Hook after loading: another parameter may stand in the place of the values (`assign=True`)."""

    def __init__(self, local: str) -> None:
        self.local = local

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        masked: MaskedTensor = vars(module)[_STATE][self.local]
        values = module._parameters.get(self.local)
        if values is not masked.values and values is not None and values.numel() == len(masked.index):
            masked.move(lambda tensor: tensor, values)
        masked.seen = -1


def masked_tensors(model: nn.Module) -> Iterator[NamedMaskedTensor]:
    """Every masked tensor of `model`, by the name that it has without the mask."""
    for path, module in model.named_modules():
        for local, masked in vars(module).get(_STATE, {}).items():
            if local in module._parameters:
                yield NamedMaskedTensor(f"{path}.{local}" if path else local, module, local, masked)
