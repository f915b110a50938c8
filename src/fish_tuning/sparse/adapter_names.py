"""Which PEFT adapter a tensor belongs to, and whether that adapter is active. PEFT writes it into the tensor's name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from fish_tuning.errors import MaskError, did_you_mean


def rename_adapter(mask: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """The mask for an adapter that is called `new` where the one it was made for was called `old`.

    Raises MaskError when no tensor of the mask is of an adapter `old`, or when the mask has one of `new` as well.

    Example:
        >>> import torch
        >>> from fish_tuning import rename_adapter
        >>> rename_adapter({"query.lora_A.default.weight": torch.tensor([True])}, "default", "b")
        {'query.lora_A.b.weight': tensor([True])}
    """
    renamed = {_renamed(name, old, new): selected for name, selected in mask.items()}
    if renamed.keys() == mask.keys() and old != new:
        raise MaskError(f"The mask has no tensor of an adapter {old!r}; its first is {next(iter(mask), None)!r}.")
    if len(renamed) < len(mask):
        raise MaskError(f"The mask has tensors of both adapters, {old!r} and {new!r}, so renaming one would lose some.")
    return renamed


def _renamed(name: str, old: str, new: str) -> str:
    parts = name.split(".")
    if old not in parts:
        return name
    # A module of the base model may have the adapter's name; PEFT's part is further back.
    last = len(parts) - 1 - parts[::-1].index(old)
    return ".".join([*parts[:last], new, *parts[last + 1 :]])


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the model's PEFT adapters."""
    configs = [getattr(module, "peft_config", None) for module in model.modules()]
    return list(dict.fromkeys(name for config in configs if isinstance(config, dict) for name in config))


def adapters_of(model: nn.Module, names: Iterable[str]) -> dict[str, str | None]:
    """For each tensor's name, its adapter; None for those of the base model."""
    adapters = set(adapter_names(model))
    return {name: next((part for part in reversed(name.split(".")) if part in adapters), None) for name in names}


def check_adapter(model: nn.Module, adapter_name: str) -> None:
    adapters = adapter_names(model)
    if adapter_name not in adapters:
        found = ", ".join(map(repr, adapters)) or "none"
        raise MaskError(
            f"The model has no adapter {adapter_name!r}.{did_you_mean(adapter_name, adapters)} Its adapters: {found}."
        )


def idle_names(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of the tensors `names` whose adapter is not active."""
    return {
        name for name, adapter in adapters_of(model, names).items() if adapter and not _active(model, name, adapter)
    }


def _active(model: nn.Module, name: str, adapter: str) -> bool:
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        # Of the nearest module that knows: PEFT's layers, the wrapper of a head, the whole model.
        active = getattr(model.get_submodule(".".join(parts[:depth])), "active_adapters", None)
        if isinstance(active, list | str):
            return adapter in ([active] if isinstance(active, str) else active)
    return True
