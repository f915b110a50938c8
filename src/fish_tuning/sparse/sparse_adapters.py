"""Sparse adapters of masked PEFT models and of ordinary adapter folders, and back, to the bit."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fish_tuning.errors import FishTuningWarning, MaskError
from fish_tuning.files.adapter_folders import LENGTH, MODEL_CONFIG, beside_adapter, check_replaceable
from fish_tuning.files.atomic import whole_folder
from fish_tuning.files.mask_file import MASK_FILE_NAME, load_mask, save_mask
from fish_tuning.files.seeded import find_seed
from fish_tuning.files.sparse_adapter_file import (
    DTYPES,
    SparseAdapter,
    SparseTensor,
    Start,
    dtype_name,
    key_of,
    load_sparse_adapter,
    state_digest,
    write_sparse_adapter,
)
from fish_tuning.sparse.adapter_names import adapters_of, check_adapter, check_head_name
from fish_tuning.sparse.base_layers import base_layers
from fish_tuning.sparse.masked_tensors import masked_tensors
from fish_tuning.sparse.seeded_starts import PROMPT, seeded_bound

CONFIG_FILE_NAME, WEIGHTS_FILE_NAME = "adapter_config.json", "adapter_model.safetensors"
_LOOKED_AT = 8  # entries of 8 random bits or more: of 65,536 seeds one has them all


def save_sparse_adapter(
    model_or_folder: nn.Module | str | os.PathLike[str], path: str | os.PathLike[str], adapter_name: str = "default"
) -> None:
    """Write a masked PEFT adapter to the file `path`: the trained values, their places, and what rebuilds the rest.

    The file has PEFT's `adapter_config.json`, the trained values in their dtype, and their places in about as few bits
    as there can be (8.1 a place where 1 % are kept, 4.7 at 10 %). Heads (`modules_to_save`) are stored whole. Frozen
    entries cost nothing where they can be rebuilt to the bit: where they are constant, as LoRA's B and (IA)³ start, or
    where `start_from_seed` set them, which is found by looking. Else they are stored too, and a warning says so.

    Args:
        model_or_folder: a PEFT model while its mask is applied, or an adapter folder that `save_pretrained` wrote of
            one, with `fish_mask.safetensors` in it. A file that is made of a folder cannot tell its base model from
            others of the same shapes.
        path: the file to write, such as `task.safetensors`.
        adapter_name: of a model's adapters the one to save.

    Raises:
        MaskError: no mask, no such adapter, merged weights, an adapter that has the name of a part of its head, or one
            whose file does not hold what the mask selects from (P-tuning's encoder, a prefix projection, weights of the
            base model: use `save_delta`).

    Warns:
        FishTuningWarning: the frozen entries of masked tensors have to be stored, so that the file is not small.

    Example:
        >>> import tempfile, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> from fish_tuning import apply_mask, load_sparse_adapter, save_sparse_adapter, start_from_seed
        >>> base = nn.Sequential(nn.Linear(64, 32))
        >>> model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"]))
        >>> start_from_seed(model, seed=1)
        >>> pool = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        >>> apply_mask(model, {name: torch.eye(*parameter.shape, dtype=torch.bool) for name, parameter in pool.items()})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_sparse_adapter(model, f"{folder}/task.safetensors")
        ...     load_sparse_adapter(f"{folder}/task.safetensors")
        SparseAdapter(LORA, 8 trained parameters of 384, base None)
    """
    if isinstance(model_or_folder, nn.Module):
        adapter = _of_model(model_or_folder, adapter_name)
    else:
        adapter = read_adapter_folder(model_or_folder)
    large = [tensor for tensor in adapter.tensors if tensor.index is not None and tensor.start is None]
    if large:
        entries = sum(tensor.shape.numel() for tensor in large)
        warnings.warn(
            f"{len(large)} masked tensors, e.g. {large[0].key!r}, have frozen entries that nothing can rebuild to the "
            f"bit, so all of their {entries:,} entries are stored and the file is not small. PEFT draws its start "
            "anew on each machine; call start_from_seed(model, seed) before training to have one that the seed gives "
            "again. Entries that an earlier mask trained (replace_mask) have to be stored in any case.",
            FishTuningWarning, stacklevel=2,
        )  # fmt: skip
    write_sparse_adapter(adapter, path)


def write_adapter_folder(path_or_adapter: str | os.PathLike[str] | SparseAdapter, save_directory: str | Path) -> None:
    """Write the ordinary adapter folder of a sparse adapter, which takes the place of an earlier one as a whole.

    `adapter_config.json`, `adapter_model.safetensors` and `fish_mask.safetensors` are those that `save_pretrained`
    wrote of the masked model, byte by byte; stock PEFT loads the folder, and `save_sparse_adapter` takes it. So is
    `model_config/config.json`, but for files of earlier versions. The README that PEFT writes beside them is not part
    of it.

    Raises MaskError when the file is missing, something else, or damaged, the adapter cannot be rebuilt, or the folder
    holds something else than an adapter.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from peft import IA3Config, get_peft_model
        >>> from torch import nn
        >>> from fish_tuning import apply_mask, save_sparse_adapter, write_adapter_folder
        >>> config = IA3Config(target_modules=["0"], feedforward_modules=[])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 4)), config)
        >>> apply_mask(model, {"base_model.model.0.ia3_l.default": torch.arange(4)[:, None] < 2})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_sparse_adapter(model, f"{folder}/task.safetensors")
        ...     write_adapter_folder(f"{folder}/task.safetensors", f"{folder}/adapter")
        ...     sorted(file.name for file in Path(folder, "adapter").iterdir())
        ['adapter_config.json', 'adapter_model.safetensors', 'fish_mask.safetensors']
    """
    adapter = path_or_adapter if isinstance(path_or_adapter, SparseAdapter) else load_sparse_adapter(path_or_adapter)
    check_replaceable(Path(save_directory))
    state = adapter.state_dict()
    with whole_folder(save_directory) as folder:
        write_unmasked(adapter, state, folder)
        save_mask(adapter.mask(), folder / MASK_FILE_NAME)
        if adapter.model_config is not None:
            (folder / MODEL_CONFIG).mkdir()
            (folder / MODEL_CONFIG / "config.json").write_bytes(adapter.model_config.encode())


def write_unmasked(adapter: SparseAdapter, state: Mapping[str, Tensor], folder: Path) -> None:
    """What PEFT reads of an adapter."""
    (folder / CONFIG_FILE_NAME).write_bytes(adapter.config.encode())
    safetensors.torch.save_file(dict(state), folder / WEIGHTS_FILE_NAME, metadata=dict(adapter.metadata))


def read_adapter_folder(
    folder: str | os.PathLike[str], base: Any = None, keys: Mapping[str, str] | None = None
) -> SparseAdapter:
    """The sparse adapter of an ordinary folder with its mask.

    `base` and `keys`, {name in the model: key in the file}, are known where the model is at hand.
    """
    for name in (CONFIG_FILE_NAME, WEIGHTS_FILE_NAME, MASK_FILE_NAME):
        if not Path(folder, name).is_file():
            raise MaskError(
                f"{os.fspath(folder)!r} has no {name}. A sparse adapter is made of a folder that save_pretrained wrote "
                "while a mask was applied."
            )
    config = _config_text(Path(folder, CONFIG_FILE_NAME))
    weights = Path(folder, WEIGHTS_FILE_NAME)
    try:
        with safe_open(weights, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise MaskError(f"{os.fspath(weights)!r} is not a readable safetensors file: {error}") from error
    mask = load_mask(Path(folder, MASK_FILE_NAME))
    adapter_name = mask_adapter_name(mask, state)
    for name in {**mask, **(keys or {})}:
        check_head_name(name, adapter_name)
    names = _names_of_keys(mask, state, adapter_name, keys or {})
    seed, tensors = _sparse_tensors(state, mask, names, json.loads(config))
    digest, (model_config, length) = state_digest(state), beside_adapter(Path(folder))
    return SparseAdapter(adapter_name, config, metadata, seed, tensors, base, digest, model_config, length)


def _config_text(path: Path) -> str:
    """The configuration as it stands, which has to be one of PEFT's."""
    try:
        text = path.read_bytes().decode()
        config = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise MaskError(f"{os.fspath(path)!r} is not readable JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise MaskError(f"{os.fspath(path)!r} is no configuration of a PEFT adapter: it names no peft_type.")
    return text


def _of_model(model: Any, adapter_name: str) -> SparseAdapter:
    if not isinstance(model, PeftModel):
        raise MaskError(
            f"A {type(model).__name__} has no adapter to save. Pass the PeftModel itself (of DDP: model.module); of "
            "the base model's own weights save_delta stores what was trained."
        )
    check_adapter(model, adapter_name)
    adapters = adapters_of(model, [tensor.name for tensor in masked_tensors(model)]).values()
    alone = len(model.peft_config) == 1  # some methods leave the adapter's name out of their tensors'
    if not (adapters if alone else adapter_name in adapters):
        raise MaskError(
            f"The adapter {adapter_name!r} has no mask, so nothing tells what was selected. Call save_sparse_adapter "
            "after apply_mask and before remove_mask; save_pretrained saves a whole adapter."
        )
    if any(getattr(module, "merged_adapters", None) for module in model.modules()):
        raise MaskError("An adapter is merged into the base weights. Call model.unmerge_adapter() before saving.")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=[adapter_name])
        subfolder = Path(folder) if adapter_name == "default" else Path(folder, adapter_name)
        adapter = read_adapter_folder(subfolder, base_layers(model, adapter_name), _keys(model, adapter_name))
    return replace(adapter, max_length=getattr(model, LENGTH, adapter.max_length))


def _keys(model: Any, adapter_name: str) -> dict[str, str]:
    """{name in the model: key in the adapter's file}, as PEFT renames what it saves of the state dict."""
    if model.peft_config[adapter_name].is_prompt_learning:
        return {}  # PEFT saves what the prompt encoder gives
    names = list(model.state_dict())
    numbers = {name: torch.tensor(number) for number, name in enumerate(names)}
    renamed = get_peft_model_state_dict(model, numbers, adapter_name, save_embedding_layers=False)
    keys = {names[int(number)]: key for key, number in renamed.items() if number.dim() == 0}
    # A module that is registered in several places has several names, of which PEFT saves one.
    modules = {path: id(module) for path, module in model.named_modules(remove_duplicate=False)}
    places = {name: (modules.get(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names}
    by_place = {places[name]: key for name, key in keys.items()}
    return {name: by_place[place] for name, place in places.items() if place in by_place}


def mask_adapter_name(mask: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """The adapter that a saved mask is of: the part of its names that PEFT leaves out of the keys of its file."""
    for name in mask:
        for part in reversed(name.split(".")):
            if name not in state and key_of(name, part) in state:
                return part
    prompts = [name.split(".")[1] for name in mask if name.startswith("prompt_encoder.")]
    return prompts[0] if prompts else "default"


def _names_of_keys(
    mask: Mapping[str, Tensor], state: Mapping[str, Tensor], adapter_name: str, keys: Mapping[str, str]
) -> dict[str, str]:
    """{key in the adapter's file: name in the mask}."""
    names: dict[str, str] = {}
    for name, selected in mask.items():
        prompt = name.removeprefix(f"prompt_encoder.{adapter_name}.")
        rule = key_of(name, adapter_name)
        # DoRA's magnitudes lose the end of their name, and prompts have names of their own.
        candidates = (keys.get(name, rule), rule, rule.removesuffix(".weight"), prompt)
        key = next((key for key in candidates if key in state), candidates[0])
        if prompt == "embedding.weight":
            key = PROMPT
        if key not in state or state[key].shape != selected.shape or key in names:
            found = f"has it in the shape {tuple(state[key].shape)}" if key in state else "does not have it"
            raise MaskError(
                f"The mask selects from {name!r}, of the shape {tuple(selected.shape)}, and the adapter's file "
                f"{found}. PEFT saves something else of such a method (P-tuning and prefix projections: the computed "
                "prompt) or nothing (base weights: save_delta stores those). Save it with save_pretrained."
            )
        names[key] = name
    return names


def _sparse_tensors(
    state: Mapping[str, Tensor], mask: Mapping[str, Tensor], names: Mapping[str, str], config: dict[str, Any]
) -> tuple[int | None, tuple[SparseTensor, ...]]:
    selected = {key: mask[names[key]].flatten() if key in names else torch.zeros(0) for key in state}
    frozen = {
        key: (~selected[key]).nonzero()[:, 0] if key in names else torch.arange(tensor.numel())
        for key, tensor in state.items()
    }
    seed = _find_seed(state, frozen, config)
    tensors = []
    for key, tensor in state.items():
        start, index = _start(key, tensor, frozen[key], config, seed), None
        if key in names and len(frozen[key]):
            index = selected[key].nonzero()[:, 0].to(torch.int32 if tensor.numel() < 2**31 else torch.int64)
        values = tensor
        if start is not None:
            values = tensor.flatten()[selected[key].nonzero()[:, 0]] if index is not None else tensor.new_zeros(0)
        tensors.append(SparseTensor(key, names.get(key), tensor.shape, tensor.dtype, index, values, start))
    used = any(tensor.start is not None and tensor.start.seeded for tensor in tensors)
    return (seed if used else None), tuple(tensors)


def _find_seed(state: Mapping[str, Tensor], frozen: Mapping[str, Tensor], config: dict[str, Any]) -> int | None:
    """The first seed that some tensor's frozen entries are told by; one adapter has one seed."""
    for key, tensor in state.items():
        bound, some = seeded_bound(key, tensor.shape, config), frozen[key]
        if bound is None or not len(some) or not _is_float(tensor):
            continue
        some = some[:: max(1, len(some) // _LOOKED_AT)]
        entries = tensor.flatten()[some].float().numpy()
        for through in _roundings(tensor):
            seed = find_seed(key, bound, some.numpy(), entries, partial(_rounded, through=through, dtype=tensor.dtype))
            if seed is not None:
                return seed
    return None


def _rounded(numbers: Any, through: str, dtype: torch.dtype) -> Any:
    return torch.from_numpy(numbers).to(getattr(torch, through)).to(dtype).float().numpy()


def _start(key: str, tensor: Tensor, frozen: Tensor, config: dict[str, Any], seed: int | None) -> Start | None:
    """The start that gives all frozen entries to the bit, if any does."""
    if not len(frozen) or not _is_float(tensor):
        return None
    entries = tensor.flatten()[frozen]
    first = float(entries[0])
    if np.isfinite(first) and _same(entries, torch.full_like(entries, first)):
        return Start(False, first, dtype_name(tensor.dtype))
    bound = seeded_bound(key, tensor.shape, config)
    if bound is not None and seed is not None:
        for through in _roundings(tensor):
            start = Start(True, bound, through)
            if _same(entries, start.tensor(seed, key, tensor.shape, tensor.dtype).flatten()[frozen]):
                return start
    return None


def _roundings(tensor: Tensor) -> Iterable[str]:
    return dict.fromkeys((dtype_name(tensor.dtype), "bfloat16", "float16"))


def _is_float(tensor: Tensor) -> bool:
    return dtype_name(tensor.dtype) in DTYPES


def _same(one: Tensor, other: Tensor) -> bool:
    """By the bits: 0 is not -0."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
