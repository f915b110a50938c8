"""Another mask in the place of one that is being trained: entries that stay keep their optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fish_tuning.errors import MaskError
from fish_tuning.sparse.applying import apply_mask, take_off_trained
from fish_tuning.sparse.masked_tensors import (
    Mask,
    dense_parameters,
    mark_replaced,
    masked_tensors,
    trained_names,
    trains_masked,
)
from fish_tuning.sparse.sharding import training_engine_of

Choice = Callable[[nn.Module], Mapping[str, Tensor]]


def replace_mask(model: nn.Module, mask: Mapping[str, Tensor] | Choice, optimizer: Optimizer) -> Mask:
    """Train other entries from here on; call it between two steps of the optimizer, under DDP in all processes.

    Entries of both masks keep their values and their optimizer state (momenta, second moments), new ones start with
    state zero, as LIFT does (arXiv 2506.00772), and those that leave keep the value that they were trained to, frozen.
    The step count is the tensor's, so AdamW's first step of a new entry is about three learning rates long; a tensor
    that had no entry at all begins at step 0.

    Args:
        model: with a mask applied.
        mask: the new mask of what trains, or a function that makes it of the model, whose mask is off meanwhile. The
            number of entries may differ. Masks of adapters that are not active stay.
        optimizer: any whose state is a tensor of the parameter's shape, or one number for all of it (AdamW, SGD with
            momentum, RMSprop, ...), also inside accelerate's wrapper. Its groups and schedulers go on as they are.

    Returns:
        The mask that now trains.

    Raises:
        MaskError: no mask is applied, the new one does not fit, the optimizer's state is of another kind (that of
            Adafactor of a whole matrix), or FSDP or DeepSpeed has the model; it then has the mask that it had.

    Example:
        >>> import torch
        >>> from fish_tuning import apply_mask, replace_mask
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> apply_mask(model, {"weight": torch.tensor([[True, False, False, False]])})
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> _ = replace_mask(model, {"weight": torch.tensor([[False, True, True, False]])}, optimizer)
        >>> [parameter.shape for parameter in optimizer.param_groups[0]["params"]]
        [torch.Size([2, 1])]
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if not trains_masked(model):
        raise MaskError("No mask is applied to what trains, so there is none to replace. Call apply_mask(model, mask).")
    if engine := training_engine_of(model):
        raise MaskError(
            f"The model is in the hands of {engine}, which goes on with the entries that it was given. Another choice "
            "while training needs one process or DDP."
        )
    before = _trained(model)
    _check_state(before, optimizer)
    earlier = take_off_trained(model)
    try:
        chosen = dict(mask(model) if callable(mask) else mask)
        apply_mask(model, chosen)  # of which DDP is told
    except BaseException:
        apply_mask(model, earlier)
        raise
    finally:
        _move(before, _trained(model), model, optimizer)
    mark_replaced(model)
    return chosen


class _Trained(NamedTuple):
    """What an optimizer holds of a tensor: a parameter, and which of the tensor's entries its numbers are."""

    parameter: nn.Parameter
    shape: torch.Size  # of the parameter now; one that a mask replaces loses its own
    positions: Tensor
    entries: int
    kind: tuple[bool, bool]  # whether it is masked, and whether it has several dimensions, by which weight decay goes


def _trained(model: nn.Module) -> dict[str, _Trained]:
    """By the name that the tensor has without a mask; of masked ones those with selected entries that train now."""
    names = trained_names(model)
    found = {
        tensor.name: _Trained(
            tensor.masked.values,
            tensor.masked.values.shape,
            tensor.masked.index.long(),
            tensor.frozen.numel(),
            (True, len(tensor.masked.shape) > 1),
        )
        for tensor in masked_tensors(model)
        if tensor.masked.values is not None and tensor.name in names
    }
    for name, parameter in dense_parameters(model).items():
        if not parameter.requires_grad:  # of an adapter that is not active
            continue
        every = torch.arange(parameter.numel(), device=parameter.device)
        found[name] = _Trained(parameter, parameter.shape, every, parameter.numel(), (False, parameter.dim() > 1))
    return found


def _check_state(before: Mapping[str, _Trained], optimizer: Optimizer) -> None:
    for name, trained in before.items():
        for key, value in optimizer.state.get(trained.parameter, {}).items():
            if isinstance(value, Tensor) and value.numel() != 1 and value.shape != trained.shape:
                raise MaskError(
                    f"{type(optimizer).__name__} keeps {key!r} of {name!r} in the shape {tuple(value.shape)}, not in "
                    f"the parameter's, {tuple(trained.shape)}, so it cannot be told which entry it belongs "
                    "to. Use AdamW, SGD or another optimizer that keeps one number an entry."
                )


def _move(before: dict[str, _Trained], after: dict[str, _Trained], model: nn.Module, optimizer: Optimizer) -> None:
    """Parameters and state of the optimizer, to those that stand for the same tensors now."""
    names = {id(trained.parameter): name for name, trained in before.items()}
    place = {id(parameter): number for number, parameter in enumerate(model.parameters())}
    groups: list[dict[str, Any]] = optimizer.param_groups
    group_of = {
        names[id(parameter)]: group for group in groups for parameter in group["params"] if id(parameter) in names
    }
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in names]
    for name, now in after.items():
        own = group_of.get(name) or _group_of_its_like(now, before, group_of)
        if own is not None:  # else the optimizer never held any of them
            own["params"].append(now.parameter)
    for group in groups:  # in the order in which an optimizer made anew would hold them: checkpoints count on it
        group["params"].sort(key=lambda parameter: place.get(id(parameter), -1))
    for name, then in before.items():
        state = optimizer.state.get(then.parameter)
        if name in after and after[name].parameter is then.parameter:
            continue
        optimizer.state.pop(then.parameter, None)
        if state and name in after:
            optimizer.state[after[name].parameter] = _state_of(state, then, after[name])


def _group_of_its_like(
    now: _Trained, before: Mapping[str, _Trained], group_of: Mapping[str, dict[str, Any]]
) -> dict[str, Any] | None:
    """For a tensor that had no selected entry: the group of the masked tensors that are most like it."""
    alike = sorted(group_of, key=lambda name: before[name].kind != now.kind)
    masked = [name for name in alike if before[name].kind[0]]
    return next((group_of[name] for name in [*masked, *alike]), None)


def _state_of(state: Mapping[str, Any], then: _Trained, now: _Trained) -> dict[str, Any]:
    moved = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.shape != then.shape:
            moved[key] = value  # one number for the whole tensor, such as the step
            continue
        whole = value.new_zeros(then.entries)
        whole[then.positions] = value.reshape(-1)
        moved[key] = whole[now.positions].view(now.shape)
    return moved
