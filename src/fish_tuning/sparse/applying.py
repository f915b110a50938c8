"""Put masks onto models, take them off, and give all processes of a distributed run the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fish_tuning.errors import MaskError, did_you_mean
from fish_tuning.model_walks import every_parameter, in_one_memory
from fish_tuning.peft_methods import refusal
from fish_tuning.sparse.adapter_names import adapters_of, check_adapter, check_saved_names, idle_names
from fish_tuning.sparse.ddp import renew_ddp
from fish_tuning.sparse.engines import Engines, check_names_kept, given_back
from fish_tuning.sparse.fsdp2 import reshard
from fish_tuning.sparse.masked_tensors import (
    LEFT_DENSE,
    NamedMaskedTensor,
    get_mask,
    group_small,
    left_dense_shapes,
    mask_tensor,
    masked_tensors,
    trained_names,
    trains_masked,
    unmask_tensor,
)
from fish_tuning.sparse.overrides import override_methods, restore_methods
from fish_tuning.sparse.sharding import engine_of, plain_name, splitting_engine_of

_DIFFERENT = (
    "The processes have different masks. Score the same examples on every rank, or make the mask on rank 0, save_mask "
    "it and load_mask it on the others."
)


def apply_mask(model: nn.Module, mask: Mapping[str, Tensor]) -> None:
    """Freeze every entry of `model` that `mask` leaves out; train the selected ones as one vector a tensor.

    Call it before the optimizer is made. A tensor whose mask is all true stays an ordinary dense parameter, and so does
    one that the mask does not name. `remove_mask` undoes it and keeps what was trained.

    While the mask is applied, `save_pretrained` writes it beside the weights as `fish_mask.safetensors`, and so does
    all that calls it (a Trainer, `push_to_hub`). Each PEFT adapter of a model can have a mask of its own: apply one,
    then `set_adapter` the next.

    Args:
        model: the model, changed in place. With several processes do it on every rank, and call `synchronize_mask`
            after it. DDP may have the model already, and FSDP (FSDP1 with `use_orig_params=True`); of DeepSpeed's, an
            engine that is destroyed (`engine.destroy()`), to be followed by another.
        mask: {name as in `model.named_parameters()`: bool tensor of the tensor's shape}, true where it trains.

    Raises:
        MaskError: unknown names, wrong shapes or dtypes, tensors that are not trainable or that an engine would go on
            with as a whole, a mask that is applied already to what trains, or an adapter whose name PEFT could not save
            it under. The model is then unchanged.

    Example:
        >>> import torch
        >>> from fish_tuning import apply_mask, count_trainable_parameters
        >>> model = torch.nn.Linear(4, 3)
        >>> apply_mask(model, {"weight": torch.eye(3, 4, dtype=torch.bool), "bias": torch.zeros(3, dtype=torch.bool)})
        >>> count_trainable_parameters(model)
        3
    """
    mask = {plain_name(name): selected for name, selected in mask.items()}
    reshard(model)  # else FSDP may show what it has gathered for the moment
    engines = Engines(model)
    with _agreed(mask, among_all=any(map(engine_of, every_parameter(model)))):
        _check(model, mask, engines)
    with given_back(model, {name for name, selected in mask.items() if not selected.all()}):
        for name, parameter in list(model.named_parameters()):
            selected = mask.get(plain_name(name))
            module, local = _owner(model, name)
            if selected is not None and not selected.all():
                mask_tensor(module, local, selected)
            elif parameter.requires_grad:
                vars(module).setdefault(LEFT_DENSE, {})[local] = engines.shape_of(parameter)
        group_small(model)
        override_methods(model)
    renew_ddp(model)


def remove_mask(model: nn.Module, adapter_name: str | None = None) -> None:
    """Make every masked tensor of `model` an ordinary, whole parameter again, with its trained values.

    What trained before trains now, as a whole; what PEFT had switched off meanwhile (an adapter that is not active)
    stays off. With `adapter_name`, that PEFT adapter's tensors alone. Under DDP do it on every rank.

    Raises MaskError when the model has no such adapter.
    """
    tensors, forgotten = list(masked_tensors(model)), set(left_dense_shapes(model))
    if adapter_name is not None:
        check_adapter(model, adapter_name)
        adapters = adapters_of(model, [*(tensor.name for tensor in tensors), *forgotten])
        tensors = [tensor for tensor in tensors if adapters[tensor.name] == adapter_name]
        forgotten = {name for name in forgotten if adapters[name] == adapter_name}
    _take_off(model, tensors, forgotten)
    if tensors:
        renew_ddp(model)


def take_off_trained(model: nn.Module) -> dict[str, Tensor]:
    """Take off, and return, the mask of what trains now; those of adapters that are not active stay on."""
    trained, whole = trained_names(model), get_mask(model)
    idle = idle_names(model, whole)
    _take_off(
        model,
        [tensor for tensor in masked_tensors(model) if tensor.name in trained],
        left_dense_shapes(model).keys() - idle,
    )
    return {name: mask for name, mask in whole.items() if name not in idle}


def _take_off(model: nn.Module, tensors: Iterable[NamedMaskedTensor], forgotten: Iterable[str]) -> None:
    """Unmask these tensors, and forget that masks left those others dense."""
    if engine := splitting_engine_of(model):
        raise MaskError(
            f"The model is split by {engine}, so this process has not all that its mask trains and cannot take it off. "
            "Save the adapter, load it into a model that is not split, and go on with that one."
        )
    trained = trained_names(model)
    for tensor in tensors:
        unmask_tensor(tensor, tensor.name in trained)
    for name in forgotten:
        module, local = _owner(model, name)
        vars(module)[LEFT_DENSE].pop(local, None)
    restore_methods(model)


def synchronize_mask(model: nn.Module) -> None:
    """Give every process of a distributed run rank 0's frozen entries, and make sure that all train the same ones.

    DDP synchronises what it finds among parameters and buffers when it is made; the frozen entries are neither, or it
    would send them at every step. Call this on all ranks after `apply_mask`; FishMaskCallback and
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
    dist.all_gather_object(ranks, (mask.hexdigest(), [(t.masked.digest, t.masked.frozen_sum) for t in tensors]))
    if len({digest for digest, _ in ranks}) > 1:
        raise MaskError(_DIFFERENT)
    for tensor, of_base in zip(tensors, ranks[0][1], strict=True):
        tensor.masked.digest, tensor.masked.frozen_sum = of_base
        if tensor.masked.split_up:
            continue  # all have a part of the same
        # NCCL sends no memory of the host, where an engine that moves parameters leaves what is none.
        nccl = torch.cuda.is_available() and dist.get_backend() == "nccl"
        sent = tensor.frozen.cuda() if nccl else tensor.frozen
        dist.broadcast(sent, src=0)
        if sent is not tensor.frozen:
            tensor.frozen.copy_(sent)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, local = name.rpartition(".")
    return model.get_submodule(path), local


@contextmanager
def _agreed(mask: Mapping[str, Tensor], among_all: bool) -> Iterator[None]:
    """What one process refuses all do, and masks that differ, where all must go on together."""
    error = None
    try:
        yield
    except MaskError as raised:
        error = raised
    if among_all and dist.get_world_size() > 1:
        digest = hashlib.sha256()
        for name in sorted(mask):
            digest.update(name.encode() + mask[name].nonzero().cpu().numpy().tobytes())
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (None if error is None else str(error), digest.hexdigest()))
        failed = [(rank, text) for rank, (text, _) in enumerate(ranks) if text is not None]
        if error is None and failed:
            raise MaskError(f"Process {failed[0][0]} of {len(ranks)} cannot apply the mask: {failed[0][1]}")
        if error is None and len({found for _, found in ranks}) > 1:
            raise MaskError(_DIFFERENT)
    if error is not None:
        raise error


def _check(model: nn.Module, mask: Mapping[str, Tensor], engines: Engines) -> None:
    """MaskError for a mask that cannot be applied."""
    if trains_masked(model):
        raise MaskError("The model has a mask already. Call remove_mask(model) before applying another.")
    if reason := refusal({type(module).__name__ for module in model.modules()}, "masked"):
        raise MaskError(reason)
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    shared = _shared_names(model)
    for name, selected in mask.items():
        if name not in parameters and f"module.{name}" in parameters:
            raise MaskError(
                f"{type(model).__name__} wraps the model that the mask is of. Apply the mask to that model itself, "
                "before it is wrapped, and make the optimizer after that."
            )
        if name not in parameters:
            check_names_kept(model)
            raise MaskError(
                f"The mask names {name!r}, which the model does not have.{did_you_mean(name, parameters)} A mask fits "
                "the model whose scores it was made from."
            )
        parameter, shape = parameters[name], engines.shape_of(parameters[name])
        engines.check(name, parameter, left_dense=selected.dtype == torch.bool and bool(selected.all()))
        if selected.dtype != torch.bool or selected.shape != shape:
            raise MaskError(
                f"The mask of {name!r} is {selected.dtype} of shape {tuple(selected.shape)}; the tensor needs "
                f"torch.bool of shape {tuple(shape)}."
            )
        if not parameter.requires_grad:
            raise MaskError(f"{name!r} is in the mask but not trainable (requires_grad=False).")
        if parameter._post_accumulate_grad_hooks and not selected.all():
            raise MaskError(
                f"{name!r} has a hook (register_post_accumulate_grad_hook), which what trains in its place would not "
                "have. Put hooks on after apply_mask, onto model.named_parameters() as they are then."
            )
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
    if engines.reachable and any(masked_tensors(model)):
        raise MaskError(
            "FSDP or DeepSpeed has the model, and an adapter of it is masked already. Apply masks of several adapters "
            "before it."
        )
    engines.check_between_steps(parameters.values())
    # Before anything is trained that could not be loaded again.
    check_saved_names(model, dict.fromkeys(adapter for adapter in adapters_of(model, mask).values() if adapter))


def _shared_names(model: nn.Module) -> dict[str, list[str]]:
    """Each name of a tensor that several modules hold, or whose memory another one has, with all the names.

    One module that is registered in several places holds its tensors once, and can be masked.
    """
    owners: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for local, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{prefix}.{local}" if prefix else local)
    shared = {name: names for names in owners.values() if len(names) > 1 for name in names}
    return in_one_memory(dict(model.named_parameters())) | shared
