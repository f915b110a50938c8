"""What sparse training changed, as a small file that can be added to the base model, removed and merged.

A delta holds the positions and the trained numbers of the selected entries, not differences: adding it writes them in
place, so the outputs are those of the trained model to the bit, and nothing is wrapped or computed at inference.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fish_tuning.errors import FishTuningWarning, MaskError, did_you_mean
from fish_tuning.files.delta_file import Delta, DeltaTensor, dtype_name, load_delta, write_delta
from fish_tuning.sparse.masked_tensors import dense_parameters, is_masked, left_dense_shapes, masked_tensors
from fish_tuning.sparse.overrides import with_whole_tensors
from fish_tuning.sparse.sharding import is_sharded, splitting_engine_of, whole_state_dict_of
from fish_tuning.sparse.values import entries_digest, frozen_as_before


class _Added(NamedTuple):
    """What an added delta needs to be taken back, for one tensor; kept on the CPU."""

    where: DeltaTensor
    overwritten: Tensor
    digest: str  # of what was written: tells whether it is still there


def save_delta(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    check_frozen: bool = True,
) -> None:
    """Write what was trained to the safetensors file `path`: some 8 bytes a selected entry in fp32, 6 in 16 bits.

    Of a masked tensor the file has the selected positions (int32 where they fit, else int64), the trained numbers in
    the tensor's dtype, and a digest of the numbers that stood there when the mask was applied, by which `add_delta`
    tells the base model from others. Tensors that train as a whole (a new head, biases in BitFit) are stored whole,
    without positions and digest; under a mask those too that have been frozen since.

    Call it after `apply_mask` and before `remove_mask`. Without a mask, a part of the model must be frozen.

    Args:
        model: masked, or with a frozen part.
        path: of the file.
        state_dict: the whole model's, where it is split (FSDP, DeepSpeed ZeRO-3) and no process has it otherwise.
        check_frozen: whether the frozen entries of masked tensors must be those of `apply_mask`, to the bit. Averages
            of whole state dicts round them anew; then False writes a delta that gives the model up to this rounding.

    Raises:
        MaskError: no mask is applied and all parameters train, or none does, so there is no part to store; or the mask
            was replaced while it trained; or frozen entries have changed since `apply_mask` (weights loaded after it,
            `layer.weight.clamp_()`, an embedding's `max_norm`, a merged adapter); or the model is split and
            `state_dict` is not there, or lacks what trains.

    Warns:
        FishTuningWarning: the model keeps running statistics (batch normalisation), which training changes too; they
            are no parameters and not in the file.

    Example:
        >>> import tempfile, torch
        >>> from fish_tuning import apply_mask, load_delta, save_delta
        >>> model = torch.nn.Linear(4, 3)
        >>> apply_mask(model, {"weight": torch.eye(3, 4, dtype=torch.bool)})  # the bias trains as a whole
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_delta(model, f"{folder}/delta.safetensors")
        ...     load_delta(f"{folder}/delta.safetensors")
        Delta(6 parameters of 2 tensors)
    """
    if not is_masked(model) and len({p.requires_grad for p in model.parameters()}) < 2:
        raise MaskError(
            "The model has no mask and no frozen part beside a trained one, so nothing tells what was selected. Call "
            "save_delta after apply_mask and before remove_mask; a whole model is saved by its save_pretrained."
        )
    if state_dict is None and (engine := splitting_engine_of(model, though_gathered=False)):
        raise MaskError(
            f"{engine} leaves each process a part of what was trained, so none can write the delta. On every process, "
            f"take the whole state dict ({whole_state_dict_of(engine)}), and on the first give it to "
            "save_delta(model, path, state_dict=...)."
        )
    if any(tensor.masked.replaced for tensor in masked_tensors(model)):
        raise MaskError(
            "The mask was replaced while it trained, so entries that it no longer selects were changed too, and a "
            "delta would miss them. Save the adapter or the model as a whole (save_pretrained)."
        )
    if any(getattr(module, "running_mean", None) is not None for module in model.modules()):
        warnings.warn(
            "The model keeps running statistics (batch normalisation). They are no parameters and not in the delta: "
            "outputs may differ unless those layers were in eval mode while training.", FishTuningWarning, stacklevel=2,
        )  # fmt: skip
    write_delta(Delta(_trained_tensors(model, state_dict, check_frozen)), path)


def add_delta(
    model: nn.Module, path_or_delta: str | os.PathLike[str] | Delta, name: str = "default", *, check_base: bool = True
) -> None:
    """Write a delta into `model` in place; the outputs are then those of the trained model, to the bit.

    Nothing is wrapped, so inference costs what it did. The overwritten entries are kept on the CPU, outside parameters
    and state dict: `remove_delta` restores them to the bit, `merge_delta` forgets them. Several deltas may be added
    under different names and removed in any order; no two of them may hold the same entry.

    Args:
        model: a model of the architecture that was trained, with the base's weights and without a mask.
        path_or_delta: a file of `save_delta`, or what `load_delta` gave.
        name: the name to remove or merge it by.
        check_base: whether the entries that are overwritten must be the very ones that training started from, in the
            same dtype. Tensors that were trained as a whole are only checked for their dtype.

    Raises:
        MaskError: a mask is applied, the name is taken, a tensor is unknown or of another shape, another delta holds
            some of the entries, or the base differs. The model is then unchanged.

    Example:
        >>> import copy, tempfile, torch
        >>> from fish_tuning import add_delta, apply_mask, load_delta, merge_delta, remove_delta, save_delta
        >>> base = torch.nn.Linear(4, 3)
        >>> model, before = copy.deepcopy(base), base.weight.clone()
        >>> apply_mask(model, {"weight": torch.eye(3, 4, dtype=torch.bool)})
        >>> next(model.parameters()).data += 1  # training
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_delta(model, f"{folder}/delta.safetensors")
        ...     delta = load_delta(f"{folder}/delta.safetensors")
        >>> add_delta(base, delta, "task")
        >>> torch.equal(base.weight, model.weight)
        True
        >>> remove_delta(base, "task")
        >>> torch.equal(base.weight, before)
        True
        >>> add_delta(base, delta)
        >>> merge_delta(base)  # for good
    """
    if is_masked(model):
        raise MaskError("The model has a mask. Call remove_mask(model) before adding a delta.")
    added = _added(model)
    if name in added:
        raise MaskError(f"A delta {name!r} is added already; added are {_listed(added)}. Give another name.")
    delta = path_or_delta if isinstance(path_or_delta, Delta) else load_delta(path_or_delta)
    parameters = dict(model.named_parameters())
    _check_fits(parameters, delta)
    _check_overlaps(added, delta, name)
    if check_base:
        _check_base(parameters, delta)
    records: dict[str, _Added] = {}
    for key, tensor in delta.tensors.items():
        parameter = parameters[key]
        overwritten = tensor.entries(parameter).to("cpu", copy=True)
        tensor.write(parameter, tensor.values)
        records[key] = _Added(tensor, overwritten, entries_digest(tensor.entries(parameter)))
    model._fish_tuning_deltas = added | {name: records}  # type: ignore[assignment]


def remove_delta(model: nn.Module, name: str = "default") -> None:
    """Take an added delta off again: every entry that it overwrote gets back the bits it had. Example: `add_delta`.

    Raises:
        MaskError: no delta of that name is added, a mask is applied, or the entries are no longer those that
            `add_delta` wrote (trained, loaded or cast since). The model is then unchanged.
    """
    records = _records(model, name)
    if is_masked(model):
        raise MaskError("The model has a mask. Call remove_mask(model) before removing a delta.")
    parameters = dict(model.named_parameters())
    for key, record in records.items():
        parameter, where = parameters.get(key), record.where
        there = parameter is not None and parameter.shape == where.shape and entries_digest(where.entries(parameter))
        if there != record.digest:
            raise MaskError(
                f"{key!r} has changed since the delta {name!r} was added: it was trained, loaded, cast or replaced. "
                f"Load the base model anew, or call merge_delta(model, {name!r}) to keep what is there."
            )
    for key, record in records.items():
        record.where.write(parameters[key], record.overwritten)
    _forget(model, name)


def merge_delta(model: nn.Module, name: str = "default") -> None:
    """Make an added delta part of the model for good: the entries it overwrote are forgotten, its name is free again.

    A delta that was trained on top of another is added after the other has been merged.

    Raises MaskError when no delta of that name is added. Example: `add_delta`.
    """
    _records(model, name)
    _forget(model, name)


def _trained_tensors(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None, check_frozen: bool
) -> dict[str, DeltaTensor]:
    whole = None if state_dict is None else with_whole_tensors(model, state_dict)
    shapes = left_dense_shapes(model)

    def given(name: str) -> Tensor:
        stored: Tensor | None = None if whole is None else whole.get(name)
        if stored is None or is_sharded(stored):
            found = "has no" if stored is None else "has a part alone of"
            raise MaskError(f"state_dict {found} {name!r}, which was trained. Gather it from all processes.")
        if stored.shape != shapes.get(name, stored.shape):
            raise MaskError(
                f"state_dict has {name!r} in the shape {tuple(stored.shape)}; the delta needs all of it, "
                f"{tuple(shapes[name])}. Gather it from all processes."
            )
        return stored

    tensors, changed = {}, []
    for tensor in masked_tensors(model):
        masked = tensor.masked
        if check_frozen:
            now = masked.read() if whole is None else whole.get(tensor.name)
            if now is not None and not is_sharded(now) and not frozen_as_before(now, masked.index, masked.frozen_sum):
                changed.append(tensor.name)
        if masked.values is not None:
            masked.group.take_written()
            entries = masked.values if whole is None else masked.entries_of(given(tensor.name))
            values = entries.detach().flatten().to("cpu", tensor.frozen.dtype, copy=True)
            tensors[tensor.name] = DeltaTensor(values, masked.index.cpu(), masked.shape, masked.digest)
    if changed:
        raise MaskError(
            f"Frozen entries have changed since apply_mask, in {len(changed)} masked tensors, e.g. {changed[0]!r}: "
            "weights of another base or start were loaded after it, or whole tensors written into (clamp_, an "
            "embedding's max_norm, a merged adapter). A delta has the selected entries alone, and would give another "
            "model. Save the model as a whole (save_pretrained, its state dict); weights are loaded before apply_mask. "
            "check_frozen=False writes it all the same."
        )
    for name, parameter in dense_parameters(model, though_frozen=True).items():
        stored = parameter if whole is None else given(name)
        values = stored.detach().to("cpu", copy=True).contiguous()
        tensors[name] = DeltaTensor(values, None, stored.shape, None)
    return tensors


def _check_fits(parameters: Mapping[str, nn.Parameter], delta: Delta) -> None:
    for name, tensor in delta.tensors.items():
        if name not in parameters:
            raise MaskError(
                f"The delta names {name!r}, which the model does not have.{did_you_mean(name, parameters)} A delta "
                "fits the architecture that it was trained on, wrapped alike (PEFT, DDP)."
            )
        parameter = parameters[name]
        if parameter.shape != tensor.shape or parameter.is_meta:
            found = "no data (meta device)" if parameter.is_meta else f"the shape {tuple(parameter.shape)}"
            raise MaskError(f"{name!r} has {found} in the model; the delta needs {tuple(tensor.shape)}.")


def _check_overlaps(added: Mapping[str, Mapping[str, _Added]], delta: Delta, name: str) -> None:
    for other, records in added.items():
        for key in records.keys() & delta.tensors.keys():
            common = _common_entries(records[key].where, delta.tensors[key])
            if common:
                raise MaskError(
                    f"The deltas {name!r} and {other!r} both hold {common:,} entries of {key!r}. Call "
                    f"remove_delta(model, {other!r}) or merge_delta(model, {other!r}) first."
                )


def _common_entries(one: DeltaTensor, other: DeltaTensor) -> int:
    if one.index is None or other.index is None:
        return (one if one.index is not None else other).values.numel()
    return int(torch.isin(one.index, other.index, assume_unique=True).sum())


def _check_base(parameters: Mapping[str, nn.Parameter], delta: Delta) -> None:
    different = []
    for name, tensor in delta.tensors.items():
        dtype = dtype_name(parameters[name].dtype)
        trained = tensor.digest.partition(":")[0] if tensor.digest else dtype_name(tensor.values.dtype)
        if trained != dtype:
            raise MaskError(
                f"{name!r} is {dtype} in the model, and the delta was trained on {trained}. Load the model with "
                f"dtype=torch.{trained}, or pass check_base=False to add it all the same."
            )
        if tensor.digest and entries_digest(tensor.entries(parameters[name])) != tensor.digest:
            different.append(name)
    if different:
        raise MaskError(
            f"The delta was trained from another base: in {len(different)} of {len(delta.tensors)} tensors, e.g. "
            f"{different[0]!r}, the entries to overwrite are not those that training started from. Load that base, "
            "with the same start for new heads and adapters, or pass check_base=False to add it all the same."
        )


def _added(model: nn.Module) -> dict[str, dict[str, _Added]]:
    """The records of the added deltas: a plain attribute of the model, so copies of the model have their own."""
    return getattr(model, "_fish_tuning_deltas", {})


def _records(model: nn.Module, name: str) -> dict[str, _Added]:
    added = _added(model)
    if name not in added:
        raise MaskError(f"No delta {name!r} is added to this model; added are: {_listed(added)}.")
    return added[name]


def _forget(model: nn.Module, name: str) -> None:
    model._fish_tuning_deltas = {n: r for n, r in _added(model).items() if n != name}  # type: ignore[assignment]


def _listed(added: Mapping[str, object]) -> str:
    return ", ".join(map(repr, added)) or "none"
