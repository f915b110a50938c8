"""Where a model's parts are loaded to: `model.device_map` and `model.max_memory`; and that processes load all of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.integrations import deepspeed

from fish_tuning.errors import ConfigurationError, did_you_mean
from fish_tuning.experiments.config.loaded_weights import DEVICE_MAPS
from fish_tuning.experiments.config.sections import ModelConfig

AWAY = ("cpu", "disk")  # where parts lie that do not fit on a GPU


@contextmanager
def made_whole() -> Iterator[None]:
    """Each process has the whole of a model that is made, though the training arguments name DeepSpeed ZeRO-3.

    transformers would split it at once; it is looked at, scored and masked first. The engine splits it.
    """
    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def loading_place(model: ModelConfig, device: torch.device | None, *, quantized: bool) -> dict[str, Any]:
    """What `from_pretrained` takes to load a model where it is to lie.

    bitsandbytes quantises weights where they are loaded, so without a map they go to `device` at once.
    """
    if model.device_map is None:
        return {"device_map": {"": device}} if quantized and device is not None else {}
    memory = {int(name) if name.isdigit() else name: amount for name, amount in (model.max_memory or {}).items()}
    return {"device_map": model.device_map, "max_memory": memory or None}


def check_device_map(model: ModelConfig, device: torch.device, processes: int = 1) -> None:
    """Refuse a map that cannot be trained on, before anything is loaded.

    Args:
        model: the section of the file.
        device: where the Trainer computes.
        processes: how many train together.
    """
    asked = model.device_map
    if asked is None:
        return
    if processes > 1:
        raise ConfigurationError(
            f"model.device_map={asked!r} spreads one model over the devices of one process, but {processes} processes "
            "train together, each with a model of its own. Start one process, or leave out model.device_map."
        )
    if asked in DEVICE_MAPS:
        if device.type == "cpu" and torch.accelerator.is_available():
            raise ConfigurationError(
                f"model.device_map={asked!r} puts parts on the GPU, but training.args_override.use_cpu trains on the "
                "CPU. Leave out one of the two."
            )
        return
    devices = {_device(each) for each in (asked.values() if isinstance(asked, dict) else [asked])}
    names = sorted(map(str, devices))
    kinds = {each.type for each in devices}
    if "meta" in kinds or ("cpu" in kinds and len(kinds) > 1):
        raise ConfigurationError(
            f"model.device_map: {', '.join(names).replace('meta', 'disk')} would keep parts of the model away from the "
            "device that trains. Allowed are GPUs alone, or the CPU alone; quantised weights need less of both."
        )
    count = torch.accelerator.device_count()
    if missing := [each for each in devices if each.type != "cpu" and (each.index or 0) >= count]:
        raise ConfigurationError(
            f"model.device_map names {missing[0]}, and {count} GPUs can be seen here, counted from 0. Name one of "
            "them, or 'auto' for whatever is there."
        )
    if len(devices) == 1 and not all(_same(each, device) for each in devices):
        raise ConfigurationError(
            f"model.device_map puts the whole model on {names[0]}, but training is on {device}. Choose the GPU with "
            "CUDA_VISIBLE_DEVICES, the CPU with training.args_override.use_cpu=true."
        )


def check_modules(model: ModelConfig, base: nn.Module) -> None:
    """Refuse a map that names a module the model lacks, or leaves a tensor without a device."""
    if not isinstance(model.device_map, dict):
        return
    names = [name for name, _ in base.named_modules()]
    tensors = [name for name, _ in (*base.named_parameters(), *base.named_buffers())]
    for place in model.device_map:
        if place not in names and place not in tensors:
            raise ConfigurationError(
                f"model.device_map: {type(base).__name__} has no module {place!r}.{did_you_mean(place, names)} Its "
                f"outermost are {', '.join(name for name, _ in base.named_children())}; '' is the whole model."
            )
    without = [name for name in tensors if not any(_holds(place, name) for place in model.device_map)]
    if without:
        raise ConfigurationError(
            f"model.device_map gives no device for {len(without)} of the {len(tensors)} tensors of "
            f"{type(base).__name__}, such as {without[0]!r}. Name their modules too, or '' for all the rest."
        )


def check_loaded_place(base: Any) -> None:
    """Refuse a model of which accelerate has put parts away, because they do not fit."""
    places: dict[str, Any] = getattr(base, "hf_device_map", None) or {}
    away = [name or "the whole model" for name, place in places.items() if str(place) in AWAY]
    if away and (len(away) < len(places) or "disk" in map(str, places.values())):
        raise ConfigurationError(
            f"model.device_map: {len(away)} of {len(places)} parts of the model do not fit on the devices that train "
            f"and would lie elsewhere, {away[0]!r} first. Raise model.max_memory, or quantise the weights "
            "(model.quantization_config)."
        )


def _device(place: str | int) -> torch.device:
    """A number is a GPU's, whether or not it is here; the disk, which is no device, is `meta`."""
    if isinstance(place, int):
        return torch.device((torch.accelerator.current_accelerator() or torch.device("cuda")).type, place)
    return torch.device("meta" if place == "disk" else place)


def _same(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index or 0) == (other.index or 0)


def _holds(place: str, name: str) -> bool:
    return not place or name == place or name.startswith(f"{place}.")
