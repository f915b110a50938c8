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
    place = _place_of(parts, old)
    return name if place is None else ".".join([*parts[:place], new, *parts[place + 1 :]])


def _place_of(parts: list[str], adapter: str) -> int | None:
    """Which part of a tensor's name is its adapter's, where the name alone is known."""
    places = [place for place, part in enumerate(parts) if part == adapter]
    # A head's own modules and tensors may have the adapter's name; those of the base model do too, further in front.
    of_head = next((place for place in places if place and parts[place - 1] == "modules_to_save"), None)
    if of_head is not None:
        return of_head
    twice = parts[-2:] == [adapter, adapter]  # `lora_A.weight.weight` of an adapter `weight`
    return places[-2 if twice else -1] if places else None


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the model's PEFT adapters."""
    configs = [getattr(module, "peft_config", None) for module in model.modules()]
    return list(dict.fromkeys(name for config in configs if isinstance(config, dict) for name in config))


def adapters_of(model: nn.Module, names: Iterable[str]) -> dict[str, str | None]:
    """For each tensor's name, its adapter; None for those of the base model."""
    adapters = set(adapter_names(model))
    return {name: _adapter_of(model, name.split("."), adapters) for name in names}


def _adapter_of(model: nn.Module, parts: list[str], adapters: set[str]) -> str | None:
    for place in range(len(parts) - 1, -1, -1):
        if parts[place] in adapters and _keeps_adapters(model, parts[:place]):
            return parts[place]
    return None


def _keeps_adapters(model: nn.Module, path: list[str]) -> bool:
    """Whether PEFT has its adapters there by their names: modules and tensors of other places may be called alike."""
    from peft.tuners._buffer_dict import BufferDict  # which is here already, where a model has adapters

    try:
        return isinstance(model.get_submodule(".".join(path)), nn.ModuleDict | nn.ParameterDict | BufferDict)
    except AttributeError:  # a wrapper between, which names leave out
        return True


def check_adapter(model: nn.Module, adapter_name: str) -> None:
    adapters = adapter_names(model)
    if adapter_name not in adapters:
        found = ", ".join(map(repr, adapters)) or "none"
        raise MaskError(
            f"The model has no adapter {adapter_name!r}.{did_you_mean(adapter_name, adapters)} Its adapters: {found}."
        )


def check_saved_names(model: nn.Module, adapters: Iterable[str]) -> None:
    """MaskError where PEFT would save one of these adapters in a file that nothing loads; `check_head_name` says why.

    Trained biases of the base model are saved without the adapter's name, as heads are.
    """
    for adapter in adapters:
        for path, module in model.named_modules():
            heads = getattr(module, "modules_to_save", None)
            if isinstance(heads, nn.ModuleDict) and adapter in heads:
                for local, _ in heads[adapter].named_parameters():
                    check_head_name(f"{path}.modules_to_save.{adapter}.{local}", adapter)
        if getattr(_config_of(model, adapter), "bias", "none") != "none":
            biases = [name for name, tensor in model.named_parameters() if tensor.requires_grad and "bias" in name]
            for name, owner in adapters_of(model, biases).items():
                if owner is None:
                    _check_saved_name(name, adapter, "a bias that it trains")


def check_head_name(name: str, adapter_name: str, called: str | None = None) -> None:
    """MaskError where PEFT would lose the tensor `name` of a head, because the adapter has the name of a part of it.

    PEFT takes the adapter's name off the end of every key of its file, those of heads too, which have it no more: an
    adapter `weight` turns `classifier.weight` into `classifier`, which nothing can load. `called` is the name that the
    adapter is to have, where that is another than in `name`.
    """
    path, of_head, local = name.partition(f".modules_to_save.{adapter_name}.")
    if of_head:
        _check_saved_name(f"{path}.{local}", called or adapter_name, "a part of its head")


def _check_saved_name(key: str, adapter: str, what: str) -> None:
    if adapter in key.split(".")[-2:]:
        raise MaskError(
            f"An adapter cannot be called {adapter!r} here: {what}, {key!r}, is called so too, and PEFT leaves that "
            "out of the name in the adapter's file, which then cannot be loaded. Give the adapter another name: "
            "get_peft_model(base, config, adapter_name='task'), add_sparse_adapter(model, file, 'task')."
        )


def _config_of(model: nn.Module, adapter: str) -> object:
    configs = [getattr(module, "peft_config", None) for module in model.modules()]
    return next((config[adapter] for config in configs if isinstance(config, dict) and adapter in config), None)


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
