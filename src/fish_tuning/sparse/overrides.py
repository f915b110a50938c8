"""Methods that do more while a mask is applied: `save_pretrained` writes it and what the adapter needs to stand alone,
`push_to_hub` carries them, `set_adapter` reaches its values, and what unloads an adapter takes it off.

They are attributes of the very objects, so that neither a class nor another model knows of them: copies have their own,
and when the mask goes, they go.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn

from fish_tuning.files.mask_file import MASK_FILE_NAME, save_mask
from fish_tuning.sparse.adapter_names import adapters_of, idle_names
from fish_tuning.sparse.masked_tensors import (
    LEFT_DENSE,
    get_mask,
    is_masked,
    masked_tensors,
    trained_names,
    unmask_tensor,
)

_BEFORE = "_fish_tuning_before_"  # holds what the object itself had under the method's name, if anything


def override_methods(model: nn.Module) -> None:
    for module in model.modules():
        # A tuner passes on what it does not have to its model; only what is a class's own is its method.
        if hasattr(type(module), "save_pretrained") and is_masked(module):
            _override(module, "save_pretrained", _save_pretrained)
            if hasattr(module, "peft_config") and hasattr(type(module), "push_to_hub"):
                _override(module, "push_to_hub", _push_to_hub)
        for name in ("merge_and_unload", "unload"):
            if hasattr(type(module), name) and is_masked(module):
                _override(module, name, _merge_and_unload if name == "merge_and_unload" else _unload)
        if hasattr(type(module), "set_adapter") and _parameter_dicts(module):
            _override(module, "set_adapter", _set_adapter)
            _override(module, "set_requires_grad", _set_requires_grad)


def restore_methods(model: nn.Module) -> None:
    for module in model.modules():
        own = vars(module)
        for key in [key for key in own if key.startswith(_BEFORE) and not is_masked(module)]:
            name, before = key.removeprefix(_BEFORE), own.pop(key)
            del own[name]
            if before is not None:
                own[name] = before


def _override(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    own = vars(module)
    if _BEFORE + name not in own:
        own[_BEFORE + name] = own.get(name)
        own[name] = partial(function, module)  # which can be pickled, as a method that is no class's own cannot


def _original(module: nn.Module, name: str) -> Callable[..., Any]:
    before: Callable[..., Any] | None = vars(module)[_BEFORE + name]
    return MethodType(getattr(type(module), name), module) if before is None else before


def _merge_and_unload(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _without_mask(_original(self, "merge_and_unload")(*args, **kwargs))


def _unload(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _without_mask(_original(self, "unload")(*args, **kwargs))


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
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    folder = Path(next(iter(given.values())))
    if given.get("is_main_process", True) and not folder.is_file():
        # A Trainer's checkpoint counts from the moment that this file is there, which it writes last.
        if re.fullmatch(r"checkpoint-\d+", folder.name):
            (folder / "trainer_state.json").unlink(missing_ok=True)
        _write_masks(self, folder, given.get("selected_adapters"))
        with _completed(self, folder, given.get("selected_adapters")):
            return original(*args, **kwargs)
    return original(*args, **kwargs)


def _completed(model: nn.Module, folder: Path, selected_adapters: Iterable[str] | None) -> AbstractContextManager[None]:
    """While adapters are saved: put beside them what they need to stand alone."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return nullcontext()  # a whole model stands alone by itself
    from fish_tuning.sharing.folder import completed

    chosen = list(model.peft_config) if selected_adapters is None else list(selected_adapters)
    return completed(model, folder, {name: "" if name == "default" else name for name in chosen})


def _push_to_hub(self: nn.Module, repo_id: str, **kwargs: Any) -> Any:
    """As transformers', which would put an empty card in the place of the adapter's."""
    from peft import PeftModel

    if not isinstance(self, PeftModel):
        return _original(self, "push_to_hub")(repo_id, **kwargs)
    from fish_tuning.sharing.hub import push_model

    return push_model(self, repo_id, **kwargs)


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
    chosen = model.peft_config if selected_adapters is None else selected_adapters
    return {
        "" if adapter == "default" else adapter: {name for name in names if adapters[name] not in (None, adapter)}
        for adapter in chosen
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
