"""Sparse training: a masked tensor becomes a frozen tensor plus a trainable vector of its selected entries.

Optimizer, gradient clipping, DDP and every count by `requires_grad` then see k numbers and nothing else; nothing about
the frozen entries has to be masked at every step. In the state dict the tensor keeps its own name and shape.

The frozen tensor is a buffer, not a parameter without gradient: code that switches the gradients of a whole adapter on
(PEFT's `set_adapter`) cannot thaw it, and FSDP does not shard it away from the values that are written into it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from fish_tuning.errors import MaskError, did_you_mean
from fish_tuning.peft_methods import refusal

Mask = dict[str, Tensor]


def apply_mask(model: nn.Module, mask: Mapping[str, Tensor]) -> None:
    """Freeze every entry of `model` that `mask` leaves out; train the selected ones as one vector a tensor.

    Call it before the optimizer is made. A tensor whose mask is all true stays an ordinary dense parameter, and so does
    one that the mask does not name. `remove_mask` undoes it and keeps what was trained.

    Args:
        model: the model, changed in place. For DDP pass the very module that is wrapped, on every rank, and call
            `synchronize_mask` after it.
        mask: {name as in `model.named_parameters()`: bool tensor of the tensor's shape}, true where it trains.

    Raises:
        MaskError: unknown names, wrong shapes or dtypes, tensors that are not trainable, or a mask already applied.
            The model is then unchanged.

    Example:
        >>> import torch
        >>> from fish_tuning import apply_mask, count_trainable_parameters
        >>> model = torch.nn.Linear(4, 3)
        >>> apply_mask(model, {"weight": torch.eye(3, 4, dtype=torch.bool), "bias": torch.zeros(3, dtype=torch.bool)})
        >>> count_trainable_parameters(model)
        3
    """
    _check(model, mask)
    for name, selected in mask.items():
        if not selected.all():
            module, local = _owner(model, name)
            _mask_tensor(module, local, selected)
    # DDP would send every buffer at each step.
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for name, module in model.named_modules():
        if isinstance(module, MaskedTensor):
            ignored |= {f"{name.rpartition('.')[0]}.original", f"{name}.index"}
    model._ddp_params_and_buffers_to_ignore = sorted(ignored)  # type: ignore[assignment]


def synchronize_mask(model: nn.Module) -> None:
    """Give every process of a distributed run rank 0's frozen entries, and make sure that all train the same ones.

    DDP synchronises what it finds among parameters and buffers when it is made, but it is told to leave the frozen
    entries alone, or it would send them at every step. Call this on all ranks after `apply_mask`; FishMaskCallback and
    FishTuningTrainer do. Without a process group of two or more it does nothing.

    Raises:
        MaskError: on every rank, when the ranks' masks differ.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    tensors = list(masked_tensors(model))
    mask = hashlib.sha256()
    for tensor in tensors:
        mask.update(tensor.name.encode() + tensor.masked.index.cpu().numpy().tobytes())
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (mask.hexdigest(), [tensor.masked.digest for tensor in tensors]))
    if len({digest for digest, _ in ranks}) > 1:
        raise MaskError(
            "The processes have different masks. Score the same examples on every rank, or make the mask on rank 0, "
            "save_mask it and load_mask it on the others."
        )
    for tensor, digest in zip(tensors, ranks[0][1], strict=True):
        dist.broadcast(tensor.frozen, src=0)
        tensor.masked.digest = digest


def remove_mask(model: nn.Module) -> None:
    """Make every masked tensor of `model` an ordinary, wholly trainable parameter again, with its trained values."""
    for tensor in list(masked_tensors(model)):
        _unmask_tensor(tensor)
    ignored = [
        name for name in getattr(model, "_ddp_params_and_buffers_to_ignore", ()) if ".parametrizations." not in name
    ]
    model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]


def get_mask(model: nn.Module) -> Mask:
    """The mask that is applied to `model`, dense trainable tensors included as all true; bool tensors by name."""
    mask = {tensor.name: tensor.masked.selected() for tensor in masked_tensors(model)}
    for name, parameter in dense_parameters(model).items():
        mask[name] = torch.ones_like(parameter, dtype=torch.bool, requires_grad=False)
    return mask


def is_masked(model: nn.Module) -> bool:
    """Whether a mask is applied to any tensor of `model`."""
    return any(isinstance(module, MaskedTensor) for module in model.modules())


def replaced_parameters(model: nn.Module) -> set[int]:
    """The ids of the dense parameters that masked tensors stand in for; no optimizer should hold them."""
    return {id(tensor.masked.dense) for tensor in masked_tensors(model)}


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters that are no masked tensor's values: what trains as a whole."""
    values = {id(tensor.masked.values) for tensor in masked_tensors(model)}
    return {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in values}


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


def _mask_tensor(module: nn.Module, local: str, selected: Tensor) -> None:
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


def _unmask_tensor(tensor: NamedMaskedTensor) -> None:
    module, local, masked = tensor.module, tensor.local, tensor.masked
    trained = getattr(module, local).detach()
    _give_own_class(module)
    parametrize.remove_parametrizations(module, local, leave_parametrized=False)
    for hook in masked.hooks:
        hook.remove()
    del module._buffers[local]
    masked.dense.data = trained
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


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, local = name.rpartition(".")
    return model.get_submodule(path), local


def _check(model: nn.Module, mask: Mapping[str, Tensor]) -> None:
    if is_masked(model):
        raise MaskError("The model has a mask already. Call remove_mask(model) before applying another.")
    if reason := refusal({type(module).__name__ for module in model.modules()}, "masked"):
        raise MaskError(reason)
    parameters = dict(model.named_parameters())
    shared = _shared_names(model)
    for name, selected in mask.items():
        if name not in parameters:
            raise MaskError(
                f"The mask names {name!r}, which the model does not have.{did_you_mean(name, parameters)} A mask fits "
                "the model whose scores it was made from."
            )
        parameter = parameters[name]
        if selected.dtype != torch.bool or selected.shape != parameter.shape:
            raise MaskError(
                f"The mask of {name!r} is {selected.dtype} of shape {tuple(selected.shape)}; the tensor needs "
                f"torch.bool of shape {tuple(parameter.shape)}."
            )
        if not parameter.requires_grad:
            raise MaskError(f"{name!r} is in the mask but not trainable (requires_grad=False).")
        if parameter._backward_hooks and not selected.all():
            raise MaskError(
                f"{name!r} has a gradient hook, which computes with the whole tensor's gradient; a mask would take it "
                "away. Train this tensor as a whole (names_to_exclude), or use another PEFT method."
            )
        if name in shared and not selected.all():
            raise MaskError(
                f"{name!r} is shared by several layers (tied weights: {', '.join(map(repr, shared[name]))}), which a "
                f"mask cannot split. Ways out: model.get_parameter({name!r}).requires_grad_(False) before scoring "
                f"leaves it out of the pool; names_to_exclude=[{name!r}] trains it as a whole."
            )


def _shared_names(model: nn.Module) -> dict[str, list[str]]:
    """Each name of a tensor that several modules hold, with all the names that it has.

    One module that is registered in several places holds its tensors once, and can be masked.
    """
    owners: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for local, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{prefix}.{local}" if prefix else local)
    return {name: names for names in owners.values() if len(names) > 1 for name in names}
