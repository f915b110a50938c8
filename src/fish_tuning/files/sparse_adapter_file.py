"""Sparse adapters on disk: one sealed safetensors file with the trained values of an adapter, their places, and what
rebuilds the ordinary adapter to the bit.

The description is long beside a per cent of a small adapter, so it is deflated, and all tensors' values of one dtype
lie in one tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fish_tuning.errors import MaskError
from fish_tuning.files.places import pack_places, unpack_places
from fish_tuning.files.sealed import check_names, is_shape, read_sealed, write_sealed
from fish_tuning.files.seeded import SEEDS, uniform

KIND = "sparse adapter"
_DESCRIPTION, _PLACES, _VALUES, _WHOLE = "description", "places", "values:", "whole:"
_MOST_DESCRIPTION = 2**26  # bytes, once inflated: what deflate makes of a damaged file is not believed
DTYPES = ("float64", "float32", "bfloat16", "float16")


class Start(NamedTuple):
    """What a tensor's frozen entries are: all `number`, or the seed's numbers between -`number` and `number`.

    Rounded to the dtype `through` before they get the tensor's own: an adapter may have been saved in 16 bits and
    trained on in 32.
    """

    seeded: bool
    number: float
    through: str

    def tensor(self, seed: int | None, key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The whole tensor at its start."""
        if not self.seeded:
            made = torch.full(shape, self.number, dtype=torch.float64)
        elif seed is None:
            raise MaskError(f"{key!r} starts from a seed, and the sparse adapter names none.")
        else:
            made = torch.from_numpy(uniform(seed, key, self.number, shape.numel())).reshape(shape)
        return made.to(getattr(torch, self.through)).to(dtype)


@dataclass(frozen=True)
class SparseTensor:
    """One tensor of an adapter, under its `key` in the ordinary adapter's file.

    `name` is the tensor's in the model and its mask, or None where the mask does not name it. `index` has the ascending
    positions of the trained entries in the flattened tensor, or is None where it trains as a whole or not at all.
    `values` are those entries; the whole tensor where there is no `start` that gives the others.
    """

    key: str
    name: str | None
    shape: torch.Size
    dtype: torch.dtype
    index: Tensor | None
    values: Tensor
    start: Start | None

    def dense(self, seed: int | None) -> Tensor:
        """The tensor as the ordinary adapter has it."""
        if self.start is None:
            return self.values
        tensor = self.start.tensor(seed, self.key, self.shape, self.dtype)
        if self.index is not None:
            tensor.view(-1)[self.index.long()] = self.values
        return tensor

    @property
    def num_trained(self) -> int:
        """Number of entries that trained."""
        if self.index is not None:
            return len(self.index)
        return self.values.numel() if self.name is not None else 0


@dataclass(frozen=True, repr=False)
class SparseAdapter:
    """A sparse adapter in memory, from `load_sparse_adapter`.

    `config` is the text of the ordinary adapter's `adapter_config.json`; `tensors` are in the order of its file, whose
    metadata are `metadata`. `adapter_name` is the adapter's in the names of the mask. `base` tells the base model's
    adapted layers, (name, shape, checksums of some entries), and is None where the base was not at hand. `digest` is
    that of the ordinary adapter's tensors. `model_config` is the text of the base model's configuration with the
    adapter's labels, `max_length` the tokens that texts are cut to, where they are known.
    """

    adapter_name: str
    config: str
    metadata: Mapping[str, str]
    seed: int | None
    tensors: tuple[SparseTensor, ...]
    base: tuple[tuple[str, tuple[int, ...], tuple[int | None, ...]], ...] | None
    digest: str
    model_config: str | None = None
    max_length: int | None = None

    @property
    def num_parameters(self) -> int:
        """Number of entries that trained."""
        return sum(tensor.num_trained for tensor in self.tensors)

    @property
    def peft_config(self) -> dict[str, Any]:
        """The adapter's configuration as a dictionary."""
        config: dict[str, Any] = json.loads(self.config)
        return config

    @property
    def is_prompt(self) -> bool:
        """Whether it is a prompt or prefix, which PEFT puts in front of the input."""
        return any(str(tensor.name).startswith("prompt_encoder.") for tensor in self.tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """The ordinary adapter's tensors, to the bit. Raises MaskError when they are not what was saved."""
        state = {tensor.key: tensor.dense(self.seed) for tensor in self.tensors}
        if state_digest(state) != self.digest:
            raise MaskError(
                "The adapter that was rebuilt is not the one that was saved (its digest differs). This machine's "
                "arithmetic does not follow IEEE 754, or the file was changed and sealed again."
            )
        return state

    def mask(self) -> dict[str, Tensor]:
        """The adapter's mask, {name: bool tensor}, as `load_mask` gives it of the ordinary adapter."""
        mask = {}
        for tensor in self.tensors:
            if tensor.name is not None:
                mask[tensor.name] = selected = torch.full(tensor.shape, tensor.index is None)
                if tensor.index is not None:
                    selected.view(-1)[tensor.index.long()] = True
        return mask

    def __repr__(self) -> str:
        config = self.peft_config
        base = config.get("base_model_name_or_path")
        return (
            f"SparseAdapter({config.get('peft_type')}, {self.num_parameters:,} trained parameters of "
            f"{sum(tensor.shape.numel() for tensor in self.tensors):,}, base {base!r})"
        )


def state_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 of an adapter's tensors: names, dtypes, shapes and bytes, in any order."""
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        digest.update(json.dumps([key, dtype_name(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def key_of(name: str, adapter_name: str) -> str:
    """The key in an ordinary adapter's file of the tensor `name` of the model, for most PEFT methods."""
    parts = name.split(".")
    if adapter_name in parts:  # a module of the base model may have the adapter's name; PEFT's part is further back
        del parts[len(parts) - 1 - parts[::-1].index(adapter_name)]
    return ".".join(part for part in parts if part != "modules_to_save")


def write_sparse_adapter(adapter: SparseAdapter, path: str | os.PathLike[str]) -> None:
    """Write a sparse adapter to the file `path`, whole or not at all."""
    places: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    values: dict[str, list[Tensor]] = {}
    stored: dict[str, Tensor] = {}
    described = []
    for tensor in adapter.tensors:
        packed = None
        if tensor.index is not None:
            low, data = pack_places(tensor.index.numpy().astype(np.int64), tensor.shape.numel())
            places.append(data)
            packed = [len(tensor.index), low, len(data)]
        if tensor.start is None:
            stored[_WHOLE + tensor.key] = tensor.values
        elif tensor.index is not None:
            values.setdefault(dtype_name(tensor.dtype), []).append(tensor.values)
        own_key = tensor.name is None or tensor.key != key_of(tensor.name, adapter.adapter_name)
        entry = [list(tensor.shape), dtype_name(tensor.dtype), packed, tensor.start, tensor.key if own_key else None]
        described.append([tensor.name, *entry])
    description = {
        "adapter_name": adapter.adapter_name,
        "config": adapter.config,
        "metadata": dict(sorted(adapter.metadata.items())),
        "seed": adapter.seed,
        "base": adapter.base,
        "digest": adapter.digest,
        "tensors": described,
    }
    beside = {"model_config": adapter.model_config, "max_length": adapter.max_length}
    description |= {name: value for name, value in beside.items() if value is not None}
    text = json.dumps(description, separators=(",", ":"), ensure_ascii=False).encode()
    stored[_DESCRIPTION] = torch.frombuffer(bytearray(zlib.compress(text, 9)), dtype=torch.uint8)
    stored[_PLACES] = torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *places]))
    stored |= {_VALUES + name: torch.cat(parts) for name, parts in values.items()}
    write_sealed(path, KIND, {}, stored)


def load_sparse_adapter(path: str | os.PathLike[str]) -> SparseAdapter:
    """Read a sparse adapter that `save_sparse_adapter` wrote.

    Raises MaskError when the file is missing, something else, or damaged.

    Example:
        >>> import tempfile
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> from fish_tuning import apply_mask, load_sparse_adapter, save_sparse_adapter, start_from_seed
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> start_from_seed(model, seed=1)
        >>> apply_mask(model, {name: p > 0.1 for name, p in model.named_parameters() if p.requires_grad})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_sparse_adapter(model, f"{folder}/task.safetensors")
        ...     adapter = load_sparse_adapter(f"{folder}/task.safetensors")
        >>> adapter.seed, adapter.num_parameters == sum(int(selected.sum()) for selected in adapter.mask().values())
        (1, True)
    """
    _, stored = read_sealed(path, KIND)
    # The checksum has seen all damage; what is looked at here is whether the content can be an adapter at all.
    try:
        return _parsed(os.fspath(path), stored)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, zlib.error) as error:
        raise MaskError(f"{os.fspath(path)!r} is damaged: its content is no sparse adapter ({error}).") from error


def _parsed(path: str, stored: Mapping[str, Tensor]) -> SparseAdapter:
    description = _description(stored[_DESCRIPTION])
    reader = _Reader(stored)
    name, config, seed = description["adapter_name"], description["config"], description["seed"]
    metadata, digest = description["metadata"], description["digest"]
    if not isinstance(json.loads(config), dict):
        raise ValueError("its adapter_config.json is no object")
    if not all(isinstance(text, str) for text in (name, digest, *metadata, *metadata.values())):
        raise ValueError("its description has something else where texts belong")
    if seed is not None and (type(seed) is not int or not 0 <= seed < SEEDS):
        raise ValueError(f"the seed {seed!r} is impossible")
    model_config, max_length = description.get("model_config"), description.get("max_length")  # newer than the others
    if model_config is not None and not isinstance(json.loads(model_config), dict):
        raise ValueError("its model_config is no object")
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise ValueError(f"texts of {max_length!r} tokens are impossible")
    tensors = tuple(_tensor(entry, name, seed, reader) for entry in description["tensors"])
    reader.check_end()
    whole = [_WHOLE + tensor.key for tensor in tensors if tensor.start is None]
    values = [_VALUES + dtype for dtype in reader.taken]
    check_names(path, [_DESCRIPTION, _PLACES, *whole, *values], stored)
    base = description["base"]
    return SparseAdapter(
        adapter_name=name,
        config=config,
        metadata=metadata,
        seed=seed,
        tensors=tensors,
        base=None
        if base is None
        else tuple((layer, tuple(shape), tuple(checksums)) for layer, shape, checksums in base),
        digest=digest,
        model_config=model_config,
        max_length=max_length,
    )


def _description(packed: Tensor) -> dict[str, Any]:
    inflater = zlib.decompressobj()
    text = inflater.decompress(packed.numpy().tobytes(), _MOST_DESCRIPTION)
    if not inflater.eof:
        raise ValueError("its description is cut off, or too long")
    description: dict[str, Any] = json.loads(text)
    return description


class _Reader:
    """Takes places and values from the front of what is stored, tensor by tensor."""

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self.stored = stored
        self.places = stored[_PLACES].numpy()
        self.at = 0
        self.taken: dict[str, int] = {}

    def index(self, packed: list[int], size: int) -> Tensor:
        count, low, length = packed
        if any(type(number) is not int for number in packed) or not 0 <= length <= len(self.places) - self.at:
            raise ValueError(f"the places {packed} are impossible")
        data = self.places[self.at : self.at + length]
        self.at += length
        places = unpack_places(data, low, count, size)
        return torch.from_numpy(places.astype(np.int32 if size < 2**31 else np.int64))

    def values(self, dtype: str, count: int) -> Tensor:
        start = self.taken.get(dtype, 0)
        values = self.stored[_VALUES + dtype][start : start + count]
        if len(values) != count or dtype_name(values.dtype) != dtype:
            raise ValueError(f"values of {dtype} are missing")
        self.taken[dtype] = start + count
        return values

    def check_end(self) -> None:
        left = [dtype for dtype, count in self.taken.items() if self.stored[_VALUES + dtype].shape != (count,)]
        if self.at != len(self.places) or left:
            raise ValueError("it has more places or values than its tensors")


def _tensor(entry: list[Any], adapter_name: str, seed: int | None, reader: _Reader) -> SparseTensor:
    name, shape, dtype, packed, start, key = entry
    key = key_of(name, adapter_name) if key is None else key
    if not is_shape(shape) or not isinstance(key, str) or not isinstance(name, str | None):
        raise ValueError(f"{key!r} is not described as a tensor")
    size = math.prod(shape)
    index = None if packed is None else reader.index(packed, size)
    if start is None:
        values = reader.stored[_WHOLE + key]
        if list(values.shape) != shape or dtype_name(values.dtype) != dtype:
            raise ValueError(f"{key!r} is stored in another shape or dtype")
    else:
        start = Start(bool(start[0]), float(start[1]), start[2])
        if dtype not in DTYPES or start.through not in DTYPES or (start.seeded and seed is None):
            raise ValueError(f"{key!r} has an impossible start")
        values = torch.zeros(0) if index is None else reader.values(dtype, len(index))
    return SparseTensor(key, name, torch.Size(shape), getattr(torch, dtype), index, values, start)
