"""Sparse training: a masked tensor becomes a frozen tensor plus a trainable vector of its selected entries.

Optimizer, gradient clipping, DDP and every count by `requires_grad` then see k numbers and nothing else; nothing about
the frozen entries has to be masked at every step. In the state dict the tensor keeps its own name and shape.

The frozen tensor is a buffer, not a parameter without gradient: code that switches the gradients of a whole adapter on
(PEFT's `set_adapter`) cannot thaw it, and FSDP does not shard it away from the values that are written into it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from fish_tuning.sparse.adapter_names import adapters_of, check_adapter, idle_names

Mask = dict[str, Tensor]

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
    return any(isinstance(module, MaskedTensor) for module in model.modules())


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


class MaskedTensor(nn.Module):
    """Parametrization of one tensor: writes the trainable `values` into the frozen tensor whenever it is read."""

    index: Tensor
    dense: nn.Parameter
    digest: str  # of the selected entries as they were before training: tells a stored delta's base from others
    hooks: tuple[RemovableHandle, ...]
    replaced = False  # whether another mask stood here before, whose entries were trained too

    def __init__(self, dense: nn.Parameter, selected: Tensor) -> None:
        super().__init__()
        # int64, though int32 would do: index_copy_ and take accept nothing else.
        index = selected.flatten().nonzero()[:, 0].to(dense.device)
        self.register_buffer("index", index, persistent=False)
        self.shape = dense.shape
        # Kept outside the module's registries: the object that an unmasked model gets back.
        object.__setattr__(self, "dense", dense)
        entries = dense.detach().take(index)
        self.digest = entries_digest(entries)
        self.values = nn.Parameter(entries) if len(index) else None

    def forward(self, frozen: Tensor) -> Tensor:
        if self.values is None:
            return frozen
        written: Tensor = _WriteValues.apply(self.values, frozen, self.index)  # type: ignore[no-untyped-call]
        return written

    def selected(self) -> Tensor:
        selected = torch.zeros(self.shape, dtype=torch.bool, device=self.index.device)
        selected.view(-1)[self.index] = True
        return selected


class _WriteValues(torch.autograd.Function):
    """The frozen tensor with `values` written into it; the gradient at the selected entries goes to `values`."""

    @staticmethod
    def forward(values: Tensor, frozen: Tensor, index: Tensor) -> Tensor:
        # Through .data: the same numbers are written at every read between two optimizer steps, so autograd need not
        # see a change of what it saved. Reads are not cached: fused optimizers change values without a trace.
        frozen.data.view(-1).index_copy_(0, index, values.to(frozen.dtype))
        return frozen.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (dense,), (index,) = grads, ctx.saved_tensors
        # take() reads any layout in place, where reshape(-1) would copy the whole gradient; index_select is faster.
        return dense.view(-1).index_select(0, index) if dense.is_contiguous() else dense.take(index), None, None


class NamedMaskedTensor(NamedTuple):
    """A masked tensor and where it is: `local` is its name in `module`, `name` that in the model."""

    name: str
    module: nn.Module
    local: str
    masked: MaskedTensor

    @property
    def frozen(self) -> Tensor:
        return self.module.get_buffer(f"parametrizations.{self.local}.original")


def mask_tensor(module: nn.Module, local: str, selected: Tensor) -> None:
    dense = module.get_parameter(local)
    masked = MaskedTensor(dense, selected)
    del module._parameters[local]
    module.register_buffer(local, dense.detach().contiguous())
    dense.data = dense.data.new_empty(0)  # the buffer holds it now
    dense.grad = None
    parametrize.register_parametrization(module, local, masked, unsafe=True)
    masked.hooks = (
        module.register_state_dict_post_hook(_DenseStateDict(local)),
        module.register_load_state_dict_pre_hook(_SplitStateDict(local)),
    )


def unmask_tensor(tensor: NamedMaskedTensor, trains: bool) -> None:
    module, local, masked = tensor.module, tensor.local, tensor.masked
    trained = getattr(module, local).detach()
    _give_own_class(module)
    parametrize.remove_parametrizations(module, local, leave_parametrized=False)
    for hook in masked.hooks:
        hook.remove()
    del module._buffers[local]
    masked.dense.data = trained
    masked.dense.requires_grad_(trains)
    module.register_parameter(local, masked.dense)


def _give_own_class(module: nn.Module) -> None:
    """A deep copy shares the class that holds the properties of masked tensors; taking a mask off must not reach it."""
    cls = type(module)
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, own)


class _DenseStateDict:
    """State-dict hook of the owning module: gives the tensor under its own name, in its own shape."""

    def __init__(self, local: str) -> None:
        self.local = local

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        own = f"{prefix}parametrizations.{self.local}."
        for key in [key for key in state_dict if key.startswith(own)]:
            del state_dict[key]
        state_dict[prefix + self.local] = getattr(module, self.local).detach()


class _SplitStateDict:
    """Load hook of the owning module: takes the dense tensor apart into the frozen one and the values."""

    def __init__(self, local: str) -> None:
        self.local = local

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        dense = state_dict.pop(prefix + self.local, None)
        if dense is None:
            return
        masked: MaskedTensor = module.get_submodule(f"parametrizations.{self.local}.0")  # type: ignore[assignment]
        own = f"{prefix}parametrizations.{self.local}."
        state_dict[f"{own}original"] = dense
        if masked.values is not None:
            state_dict[f"{own}0.values"] = dense.detach().flatten()[masked.index.to(dense.device)]


def masked_tensors(model: nn.Module) -> Iterator[NamedMaskedTensor]:
    """Every masked tensor of `model`, by the name that it has without the mask."""
    for path, masked in model.named_modules():
        if isinstance(masked, MaskedTensor):
            owner, _, rest = path.rpartition("parametrizations.")
            local = rest.removesuffix(".0")
            yield NamedMaskedTensor(owner + local, model.get_submodule(owner.removesuffix(".")), local, masked)
