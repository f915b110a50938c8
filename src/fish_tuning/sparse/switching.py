"""Many sparse adapters on one base model: one resident adapter of PEFT's for all of one start, in which a switch
changes the trained entries alone.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fish_tuning.errors import MaskError, did_you_mean
from fish_tuning.files.sparse_adapter_file import SparseAdapter, load_sparse_adapter
from fish_tuning.sparse.adapter_names import adapter_names, adapters_of, check_head_name, rename_adapter
from fish_tuning.sparse.applying import apply_mask
from fish_tuning.sparse.base_layers import check_base_layers
from fish_tuning.sparse.sparse_adapters import write_unmasked

_STATE = "_fish_tuning_sparse_adapters"
_OF_THE_BASE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")


class _Entries(NamedTuple):
    """What an adapter writes into one tensor: `values` at `places`, or the whole tensor."""

    name: str
    places: Tensor | None
    values: Tensor


# {name of a tensor: its module and its name in that}, since finding it by its name took most of a switch's time
Owners = dict[str, tuple[nn.Module, str]]


@dataclass
class _Adapter:
    """An added adapter. `entries` is None where it has PEFT's adapter `resident` for itself."""

    resident: str
    entries: list[_Entries] | None
    trains: bool


@dataclass
class _State:
    adapters: dict[str, _Adapter] = field(default_factory=dict)
    residents: dict[Hashable, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)  # {resident: the adapter whose entries are in it}
    overwritten: dict[str, list[Tensor | None]] = field(default_factory=dict)  # by resident
    owners: dict[str, Owners] = field(default_factory=dict)  # by resident


def add_sparse_adapter(
    model: nn.Module,
    path_or_adapter: str | os.PathLike[str] | SparseAdapter,
    name: str = "default",
    *,
    is_trainable: bool = False,
    check_base: bool = True,
) -> Any:
    """Add a sparse adapter to a base model, as the active one; the outputs are those of the trained model.

    Adapters of one configuration whose frozen entries come of one seed (or are constant) share one adapter in PEFT's
    layers: each adds its trained entries in memory, and `set_sparse_adapter` changes between them in milliseconds.
    Others are added as PEFT adapters of their own. `model.merge_and_unload()` merges the active one for good.

    Args:
        model: the base model, which PEFT changes in place, or what an earlier call returned. It may also be a PEFT
            model with other adapters.
        path_or_adapter: a file of `save_sparse_adapter`, or what `load_sparse_adapter` gave.
        name: the name to set or remove it by.
        is_trainable: add it as a PEFT adapter `name` of its own with its mask applied, to train it further.
        check_base: whether the base must be the one that the adapter was trained on, by shape and some entries of the
            adapted layers. A file that was made of a folder does not tell its base.

    Returns:
        The PEFT model.

    Raises:
        MaskError: the file is damaged, the name is taken or that of a part of the head, an adapter is merged, or the
            base is another or has another number of labels; the model is then unchanged.

    Example:
        >>> import copy, tempfile, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> from fish_tuning import add_sparse_adapter, apply_mask, list_sparse_adapters, remove_sparse_adapter
        >>> from fish_tuning import save_sparse_adapter, set_sparse_adapter, start_from_seed
        >>> base = nn.Sequential(nn.Linear(8, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for task in ("a", "b"):
        ...         model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["0"]))
        ...         start_from_seed(model, seed=1)
        ...         apply_mask(model, {"base_model.model.0.lora_B.default.weight": torch.eye(4, 2, dtype=torch.bool)})
        ...         _ = next(p for p in model.parameters() if p.requires_grad).data.fill_(ord(task))  # training
        ...         save_sparse_adapter(model, f"{folder}/{task}.safetensors")
        ...     loaded = add_sparse_adapter(base, f"{folder}/a.safetensors", "a")
        ...     loaded = add_sparse_adapter(loaded, f"{folder}/b.safetensors", "b")
        >>> list_sparse_adapters(loaded)
        ['a', 'b']
        >>> torch.equal(loaded(torch.ones(8)), model(torch.ones(8)))
        True
        >>> set_sparse_adapter(loaded, "a")
        >>> remove_sparse_adapter(loaded, "b")
    """
    adapter = path_or_adapter if isinstance(path_or_adapter, SparseAdapter) else load_sparse_adapter(path_or_adapter)
    state: _State = getattr(model, _STATE, None) or _State()
    if isinstance(model, PeftModel):
        if not model.peft_config:
            raise MaskError(
                "The PEFT model's last adapter was deleted. Pass its base model: model.base_model.unload()."
            )
        _forget_deleted(model, state)
        _check_unmerged(model.modules())
    _check(model, name, state)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if check_base and adapter.base is not None:
        check_base_layers(base, adapter.base, adapter.peft_config.get("base_model_name_or_path"))
    _check_heads(base, adapter)
    group = None if is_trainable else _group(adapter)
    for tensor in adapter.tensors:
        check_head_name(str(tensor.name), adapter.adapter_name)  # of files of earlier versions
        if group is None:  # else PEFT does not get to know the name
            check_head_name(str(tensor.name), adapter.adapter_name, called=name)
    if group is None:
        model = _with_peft_adapter(model, adapter, adapter.state_dict(), name, is_trainable)
        state.adapters[name] = _Adapter(name, None, is_trainable)
        if is_trainable:
            _mask(model, adapter, name)
    else:
        if group not in state.residents:
            resident = _free_name(model)
            model = _with_peft_adapter(model, adapter, _start_of(adapter), resident, False)
            state.residents[group] = resident
            state.owners[resident] = _owners(model, _entries(adapter, resident, every=True))
        resident = state.residents[group]
        state.adapters[name] = _Adapter(resident, _entries(adapter, resident), False)
    setattr(model, _STATE, state)
    set_sparse_adapter(model, name)
    return model


def set_sparse_adapter(model: nn.Module, name: str) -> None:
    """Make an added sparse adapter the active one; the outputs are then those of its trained model, to the bit.

    Where it shares a start with the adapter that was active before, only the trained entries of both are written.

    Raises MaskError when no sparse adapter of that name is added, or while one is merged into the base weights.
    Example: `add_sparse_adapter`.
    """
    state, adapter = _found(model, name)
    whole: Any = model
    moves = whole.active_adapter != adapter.resident
    if moves:
        _check_unmerged(model.modules())  # or PEFT would unmerge, which leaves the base weights rounded
    if adapter.entries is not None and state.written.get(adapter.resident) != name:
        _check_unmerged(_modules_above(model, adapter.entries))
        _restore(state, adapter.resident)
        owners = state.owners[adapter.resident]
        state.overwritten[adapter.resident] = [_write(owners, entries) for entries in adapter.entries]
        state.written[adapter.resident] = name
    if moves:
        whole.set_adapter(adapter.resident, inference_mode=not adapter.trains)


def remove_sparse_adapter(model: nn.Module, name: str) -> None:
    """Forget an added sparse adapter. Where it was the last one of its start, its PEFT adapter is deleted too.

    Raises MaskError when no sparse adapter of that name is added, or when it is the active one: set another before, or
    take all off with `model.unload()`. Example: `add_sparse_adapter`.
    """
    state, adapter = _found(model, name)
    whole: Any = model
    sharing = [other for other, each in state.adapters.items() if each.resident == adapter.resident and other != name]
    written = adapter.entries is None or state.written.get(adapter.resident) == name
    if written and whole.active_adapter == adapter.resident:
        raise MaskError(
            f"The sparse adapter {name!r} is the active one. Call set_sparse_adapter(model, ...) with another one's "
            "name before removing it; model.unload() takes all adapters off (PEFT leaves the active one's head)."
        )
    if written and sharing:
        _restore(state, adapter.resident)
    del state.adapters[name]
    if not sharing:
        whole.delete_adapter(adapter.resident)
        state.residents = {group: each for group, each in state.residents.items() if each != adapter.resident}
        for kept in (state.written, state.overwritten, state.owners):
            kept.pop(adapter.resident, None)


def list_sparse_adapters(model: nn.Module) -> list[str]:
    """The names of the sparse adapters that are added to `model`, in order. Example: `add_sparse_adapter`."""
    state: _State = getattr(model, _STATE, None) or _State()
    return list(state.adapters)


def _check(model: nn.Module, name: str, state: _State) -> None:
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise MaskError(
            f"{name!r} cannot be the name of an adapter in PEFT's layers, which have it already. Give another."
        )
    if name in state.adapters or name in adapter_names(model):
        raise MaskError(f"The model has an adapter {name!r} already. Give another name.")
    if not isinstance(model, PeftModel) and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise MaskError(
            "PEFT has put adapters into this model already. Pass the PEFT model: what the earlier "
            "add_sparse_adapter, or get_peft_model, returned."
        )


def _check_heads(base: nn.Module, adapter: SparseAdapter) -> None:
    """Refuse a head of another shape before PEFT has changed the model."""
    modules = dict(base.named_modules())
    outside = "base_model." if adapter.is_prompt else "base_model.model."
    for tensor in adapter.tensors:
        path, _, local = str(tensor.name).partition(f".modules_to_save.{adapter.adapter_name}.")
        head: Any = modules.get(path.removeprefix(outside)) if local else None
        head = getattr(head, "original_module", head)
        own = None if head is None else dict(head.named_parameters()).get(local)
        if own is not None and own.shape != tensor.shape:
            raise MaskError(
                f"The sparse adapter has a head {path.removeprefix(outside)!r} whose {local} has the shape "
                f"{tuple(tensor.shape)}; the base model's has {tuple(own.shape)}. Load its own base, with as many "
                f"labels as the adapter was trained with (num_labels={tensor.shape[0]})."
            )


def _group(adapter: SparseAdapter) -> Hashable | None:
    """What adapters that can share one resident have in common; None for one that needs an adapter for itself."""
    described = []
    for tensor in adapter.tensors:
        own = tensor.name is not None and adapter.adapter_name in tensor.name.split(".")
        whole = tensor.start is None
        if (whole and tensor.index is not None) or ((whole or tensor.index is not None) and not own):
            return None
        name = tensor.name if tensor.name is None else _renamed(tensor.name, adapter.adapter_name, "")
        described.append((tensor.key, name, tensor.shape, tensor.dtype, tensor.start))
    config = {key: value for key, value in adapter.peft_config.items() if key not in _OF_THE_BASE}
    return json.dumps(config, sort_keys=True), adapter.seed, tuple(sorted(described))


def _renamed(name: str, old: str, new: str) -> str:
    return next(iter(rename_adapter({name: torch.zeros(0)}, old, new)))


def _start_of(adapter: SparseAdapter) -> dict[str, Tensor]:
    """The adapter's tensors before training; those that train as a whole as they are."""
    adapter.state_dict()  # once for each start: whether this machine gives it to the bit
    return {
        tensor.key: tensor.values
        if tensor.start is None
        else tensor.start.tensor(adapter.seed, tensor.key, tensor.shape, tensor.dtype)
        for tensor in adapter.tensors
    }


def _with_peft_adapter(
    model: Any, adapter: SparseAdapter, tensors: dict[str, Tensor], name: str, is_trainable: bool
) -> Any:
    # PEFT loads no prompts to train; _mask has them trained all the same.
    is_trainable = is_trainable and not adapter.is_prompt
    with tempfile.TemporaryDirectory() as folder:
        write_unmasked(adapter, tensors, Path(folder))
        if not isinstance(model, PeftModel):
            return PeftModel.from_pretrained(model, folder, adapter_name=name, is_trainable=is_trainable)
        try:
            model.load_adapter(folder, name, is_trainable=is_trainable)
        except Exception:
            if name in model.peft_config:
                model.delete_adapter(name)
            raise
        return model


def _mask(model: Any, adapter: SparseAdapter, name: str) -> None:
    model.set_adapter(name)
    mask = adapter.mask()
    if any(adapter.adapter_name in each.split(".") for each in mask):
        mask = rename_adapter(mask, adapter.adapter_name, name)
    model.peft_config[name].inference_mode = False
    of = adapters_of(model, [each for each, _ in model.named_parameters()])
    for each, parameter in model.named_parameters():
        if each in mask or of[each] == name:
            parameter.requires_grad_(each in mask)  # as it was when the mask was made
    apply_mask(model, mask)


def _free_name(model: nn.Module) -> str:
    taken = adapter_names(model)
    return next(name for name in ("default", *(f"sparse_{n}" for n in range(1, len(taken) + 2))) if name not in taken)


def _entries(adapter: SparseAdapter, resident: str, *, every: bool = False) -> list[_Entries]:
    """What it writes; with `every`, tensors without a trained entry too."""
    return [
        _Entries(_renamed(tensor.name, adapter.adapter_name, resident), tensor.index, tensor.values)
        for tensor in adapter.tensors
        if tensor.name is not None and (every or tensor.index is None or len(tensor.index))
    ]


def _owners(model: nn.Module, entries: list[_Entries]) -> Owners:
    places = (each.name.rpartition(".") for each in entries)
    return {f"{path}.{local}": (model.get_submodule(path), local) for path, _, local in places}


def _found(model: nn.Module, name: str) -> tuple[_State, _Adapter]:
    state: _State = getattr(model, _STATE, None) or _State()
    if name not in state.adapters:
        raise MaskError(
            f"No sparse adapter {name!r} is added to this model.{did_you_mean(name, state.adapters)} Added are: "
            f"{', '.join(map(repr, state.adapters)) or 'none'}."
        )
    adapter = state.adapters[name]
    if adapter.resident not in model.peft_config:  # type: ignore[operator]
        raise MaskError(
            f"PEFT's adapter {adapter.resident!r}, which {name!r} is written into, was deleted. Load it anew."
        )
    return state, adapter


def _forget_deleted(model: Any, state: _State) -> None:
    """Let go of adapters that were written into what PEFT's delete_adapter has taken off since."""
    state.adapters = {name: each for name, each in state.adapters.items() if each.resident in model.peft_config}
    state.residents = {group: each for group, each in state.residents.items() if each in model.peft_config}
    kept: dict[str, Any]
    for kept in (state.written, state.overwritten, state.owners):
        for resident in kept.keys() - model.peft_config.keys():
            del kept[resident]


def _check_unmerged(modules: Iterable[nn.Module]) -> None:
    if any(getattr(module, "merged_adapters", None) for module in modules):
        raise MaskError(
            "An adapter is merged into the base weights, where another cannot take its place. Call "
            "model.unmerge_adapter() first."
        )


def _modules_above(model: nn.Module, entries: list[_Entries]) -> Iterator[nn.Module]:
    """Of one layer: PEFT merges all of them, and all are looked at in a time that a switch does not have."""
    module, parts = model, entries[0].name.split(".") if entries else []
    for part in parts[:-1]:
        module = module.get_submodule(part)
        yield module


def _restore(state: _State, resident: str) -> None:
    """Give the entries of the adapter that is written now the bits of the start."""
    name = state.written.pop(resident, None)
    if name is None:
        return
    for entries, before in zip(state.adapters[name].entries or (), state.overwritten.pop(resident), strict=True):
        if before is not None:
            _write(state.owners[resident], entries._replace(values=before))


def _write(owners: Owners, entries: _Entries) -> Tensor | None:
    """Write entries into their tensor; what stood there, or None for a whole tensor, which the next one brings."""
    module, local = owners[entries.name]
    parameter: Any = module._parameters[local]
    with torch.no_grad():
        if entries.places is None:
            parameter.copy_(entries.values)
            return None
        places = entries.places.to(parameter.device, torch.long)
        before: Tensor = parameter.take(places)
        parameter.put_(places, entries.values.to(parameter))
    return before
