"""Methods that do more while a mask is applied: `save_pretrained` writes it and what the adapter needs to stand alone,
`push_to_hub` carries them, a Trainer's model card gives way to the adapter's, `set_adapter` reaches the mask's values,
and what unloads an adapter takes it off.

The very objects get a class with them, so that neither their own class nor another model knows of them: copies have
them too, and when the mask goes, they go. What an object holds itself and is bound to it would keep it alive until the
cyclic collector runs.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn

from fish_tuning.errors import MaskError
from fish_tuning.files.mask_file import MASK_FILE_NAME, save_mask
from fish_tuning.sparse.adapter_names import adapters_of, check_saved_names, idle_names
from fish_tuning.sparse.masked_tensors import (
    LEFT_DENSE,
    get_mask,
    is_masked,
    masked_methods,
    masked_names,
    masked_tensors,
    set_methods,
    trained_names,
    unmask_tensor,
)
from fish_tuning.sparse.sharding import FSDP1, names_alone, splitting_engine_of, whole_state_dict_of

_SAVING = "_fish_tuning_saving"  # an attribute of a model for as long as it is saved
_BEFORE = "_fish_tuning_before_"  # holds what the object itself had under the method's name, if it had anything


def override_methods(model: nn.Module) -> None:
    for module in model.modules():
        # A tuner passes on what it does not have to its model; only what is a class's own is its method.
        if hasattr(type(module), "save_pretrained") and is_masked(module):
            _override(module, "save_pretrained", _save_pretrained)
            if hasattr(module, "peft_config") and hasattr(type(module), "push_to_hub"):
                _override(module, "push_to_hub", _push_to_hub)
            if hasattr(type(module), "create_or_update_model_card"):
                _override(module, "create_or_update_model_card", _create_or_update_model_card)
        for name in ("merge_and_unload", "unload"):
            if hasattr(type(module), name) and is_masked(module):
                _override(module, name, _merge_and_unload if name == "merge_and_unload" else _unload)
        if hasattr(type(module), "get_parameter_or_buffer") and is_masked(module):
            _override(module, "get_parameter_or_buffer", _get_parameter_or_buffer)
        if hasattr(type(module), "set_adapter") and _parameter_dicts(module):
            _override(module, "set_adapter", _set_adapter)
            _override(module, "set_requires_grad", _set_requires_grad)


def restore_methods(model: nn.Module) -> None:
    for module in model.modules():
        methods, own = masked_methods(module), vars(module)
        if not methods or is_masked(module):
            continue
        set_methods(module, frozenset())
        for name, _ in methods:
            own.pop(name, None)
            if _BEFORE + name in own:
                own[name] = own.pop(_BEFORE + name)


def _override(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    own, methods = vars(module), masked_methods(module)
    if name not in dict(methods):
        if name in own:
            own[_BEFORE + name] = own.pop(name)
        set_methods(module, methods | {(name, function)})


def _original(module: nn.Module, name: str) -> Callable[..., Any]:
    before: Callable[..., Any] | None = vars(module).get(_BEFORE + name)
    return MethodType(getattr(type(module)._unmasked, name), module) if before is None else before  # type: ignore[attr-defined]


def _merge_and_unload(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _without_mask(_original(self, "merge_and_unload")(*args, **kwargs))


def _unload(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _without_mask(_original(self, "unload")(*args, **kwargs))


def _get_parameter_or_buffer(self: nn.Module, target: str) -> Any:
    """A masked tensor is asked for too, by transformers, which counts a GPU's bytes before it loads an adapter."""
    path, _, local = target.rpartition(".")
    module = self.get_submodule(path)
    if local in masked_names(module):
        return getattr(module, local)
    return _original(self, "get_parameter_or_buffer")(target)


def _without_mask(model: nn.Module) -> nn.Module:
    """A base model without its adapter is an ordinary model, its head too."""
    trained = trained_names(model)
    for tensor in list(masked_tensors(model)):
        unmask_tensor(tensor, tensor.name in trained)
    for module in model.modules():
        vars(module).pop(LEFT_DENSE, None)
    restore_methods(model)
    return model


def _save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The object's own save_pretrained, once the mask is written: weights without it would pass for unmasked ones."""
    original = _original(self, "save_pretrained")
    bound = inspect.signature(original).bind(*args, **kwargs)
    given = bound.arguments
    folder = Path(next(iter(given.values())))
    others = given if "state_dict" in given else given.get("kwargs", {})
    if any("_fsdp_wrapped_module" in name for name, _ in self.named_modules()):
        raise MaskError(
            "Parts of the model are wrapped by FSDP1 (FullyShardedDataParallel), whose names keep save_pretrained from "
            "finding the adapter's tensors: it would leave them out without a word. Load the whole state dict "
            f"({whole_state_dict_of(FSDP1)}) into a model that is not wrapped, and save that; or use FSDP2."
        )
    if others.get("state_dict") is not None:
        others["state_dict"] = with_whole_tensors(self, others["state_dict"])
        if given.get("is_main_process", True):
            _check_complete(self, others["state_dict"])
    elif engine := splitting_engine_of(self, though_gathered=False):
        raise MaskError(
            f"The model is split by {engine}, so this process has only a part of what is to be saved. On every "
            f"process, take the whole state dict ({whole_state_dict_of(engine)}), and on the first give it to "
            "save_pretrained(folder, state_dict=...). A Trainer's save_model does so."
        )
    if given.get("is_main_process", True) and not folder.is_file():
        check_saved_names(self, _saved_adapters(self, given.get("selected_adapters")))  # others than the masked one too
        # A Trainer's checkpoint counts from the moment that this file is there, which it writes last.
        if re.fullmatch(r"checkpoint-\d+", folder.name):
            (folder / "trainer_state.json").unlink(missing_ok=True)
        _write_masks(self, folder, given.get("selected_adapters"))
        vars(self)[_SAVING] = True
        try:
            given_whole = names_alone() if others.get("state_dict") is not None else nullcontext()
            with _completed(self, folder, given.get("selected_adapters")), given_whole:
                return original(*bound.args, **bound.kwargs)
        finally:
            vars(self).pop(_SAVING, None)
    return original(*bound.args, **bound.kwargs)


def _check_complete(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    missing = [name for name in trained_names(model) if name not in state_dict]
    if missing and splitting_engine_of(model):
        raise MaskError(
            f"state_dict has no {min(missing)!r}, so what has been trained would not be saved. Gather it from all "
            "processes; with DeepSpeed ZeRO-3, set stage3_gather_16bit_weights_on_model_save to true in its "
            "configuration (accelerate calls it zero3_save_16bit_model)."
        )


def with_whole_tensors(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of whole tensors, where an engine that gathers parameters has put the selected entries alone.

    A tensor without a selected entry has no parameter, so such an engine leaves it out.
    """
    made = dict(state_dict)
    trained = trained_names(model) if splitting_engine_of(model) else set()
    for tensor in masked_tensors(model):
        stored = made.get(tensor.name)
        if stored is None and tensor.masked.values is None and tensor.name in trained:
            made[tensor.name] = tensor.frozen.detach().clone()
        if stored is None or stored.shape == tensor.masked.shape:
            continue
        if stored.numel() != tensor.masked.num_selected:
            raise MaskError(
                f"state_dict has {tensor.name!r} in the shape {tuple(stored.shape)}; what is saved needs all of it, "
                f"{tuple(tensor.masked.shape)}. Gather the state dict from all processes."
            )
        made[tensor.name] = tensor.masked.dense_of(stored)
    return made


def _completed(model: nn.Module, folder: Path, selected_adapters: Iterable[str] | None) -> AbstractContextManager[None]:
    """While adapters are saved: put beside them what they need to stand alone."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return nullcontext()  # a whole model stands alone by itself
    from fish_tuning.sharing.folder import completed

    chosen = _saved_adapters(model, selected_adapters)
    return completed(model, folder, {name: "" if name == "default" else name for name in chosen})


def _saved_adapters(model: nn.Module, selected_adapters: Iterable[str] | None) -> list[str]:
    return list(getattr(model, "peft_config", {}) if selected_adapters is None else selected_adapters)


def _push_to_hub(self: nn.Module, repo_id: str, **kwargs: Any) -> Any:
    """As transformers', which would put an empty card in the place of the adapter's."""
    from peft import PeftModel

    if not isinstance(self, PeftModel):
        return _original(self, "push_to_hub")(repo_id, **kwargs)
    from fish_tuning.sharing.hub import push_model

    return push_model(self, repo_id, **kwargs)


def _create_or_update_model_card(self: nn.Module, output_dir: str) -> None:
    """As PEFT's. A Trainer calls it when it has written a card of its own over the adapter's, which comes back."""
    from fish_tuning.sharing.folder import ADAPTER_CONFIG, complete_adapter

    _original(self, "create_or_update_model_card")(output_dir)
    if _SAVING in vars(self):
        return  # PEFT calls it before it writes the adapter, which is completed after that
    if (Path(output_dir) / ADAPTER_CONFIG).is_file() and "default" in getattr(self, "peft_config", {}):
        complete_adapter(self, output_dir)


def _write_masks(model: nn.Module, folder: Path, selected_adapters: Iterable[str] | None) -> None:
    mask = get_mask(model)
    masked = {tensor.name for tensor in masked_tensors(model)}
    for subfolder, left_out in _saved_folders(model, mask, selected_adapters).items():
        if masked - left_out:
            os.makedirs(folder / subfolder, exist_ok=True)
            saved = {name: selected for name, selected in mask.items() if name not in left_out}
            save_mask(saved, folder / subfolder / MASK_FILE_NAME)


def _saved_folders(
    model: nn.Module, names: Collection[str], selected_adapters: Iterable[str] | None
) -> dict[str, set[str]]:
    """The folders that save_pretrained writes adapters into, each with the tensors that are of other adapters."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return {"": idle_names(model, names)}  # transformers writes the active adapters, or the whole model
    adapters = adapters_of(model, names)
    return {
        "" if adapter == "default" else adapter: {name for name in names if adapters[name] not in (None, adapter)}
        for adapter in _saved_adapters(model, selected_adapters)
    }


def _parameter_dicts(layer: nn.Module) -> list[nn.ParameterDict]:
    return [child for child in layer.children() if isinstance(child, nn.ParameterDict) and is_masked(child)]


def _set_adapter(self: nn.Module, adapter_names: str | list[str], inference_mode: bool = False) -> Any:
    # PEFT asks a ParameterDict for its tensors and switches those that are leaves, which a masked one is not.
    result = _original(self, "set_adapter")(adapter_names, inference_mode=inference_mode)
    active = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    _switch(self, lambda adapter: adapter in active and not inference_mode)
    return result


def _set_requires_grad(self: nn.Module, adapter_names: str | Iterable[str], requires_grad: bool = True) -> Any:
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    result = _original(self, "set_requires_grad")(names, requires_grad)
    _switch(self, lambda adapter: requires_grad if adapter in names else None)
    return result


def _switch(layer: nn.Module, wanted: Callable[[str], bool | None]) -> None:
    for parameters in _parameter_dicts(layer):
        for tensor in masked_tensors(parameters):
            flag = wanted(tensor.local)
            if tensor.masked.values is not None and flag is not None:
                tensor.masked.values.requires_grad_(flag)
