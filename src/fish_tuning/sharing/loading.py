"""From an adapter's folder to its model, in one call: base model, labels, adapter, and the mask to go on training."""

from __future__ import annotations

import importlib
import os
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from peft import __version__ as peft_version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from fish_tuning.errors import ConfigurationError, FishTuningWarning, MaskError, did_you_mean
from fish_tuning.files.adapter_folders import LENGTH, MODEL_CONFIG, length_beside
from fish_tuning.files.mask_file import MASK_FILE_NAME, load_mask
from fish_tuning.sharing.card import is_local
from fish_tuning.sharing.folder import ADAPTER_CONFIG, check_weights, read_adapter_config
from fish_tuning.sharing.hub import fetched
from fish_tuning.sharing.label_numbers import labels_of_head
from fish_tuning.sharing.reaching import hub_arguments
from fish_tuning.sharing.usage import OWN_METHODS
from fish_tuning.sparse.adapter_names import check_saved_names, rename_adapter
from fish_tuning.sparse.applying import apply_mask
from fish_tuning.sparse.sparse_adapters import mask_adapter_name

_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}

_WAYS_OUT = (
    "Give the whole base model that it was trained on with base_model=... (in the command --base-model), or train "
    "again with these modules in modules_to_save, and their weights lie in the adapter."
)


def load_adapter(
    folder: str | os.PathLike[str],
    *,
    is_trainable: bool = False,
    base_model: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    revision: str | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> PeftModel:
    """The PEFT model of a saved adapter: its base model, with its label names, and the adapter on it.

    With `is_trainable=True` the adapter trains on as it was trained: the mask that lies beside it is applied, and what
    the mask does not name stays frozen. Without a mask it trains as PEFT has it.

    Args:
        folder: an adapter's folder, a Trainer's checkpoint, or a repository of the hub.
        is_trainable: whether to go on training; else the model is in evaluation mode and nothing in it trains.
        base_model: the base model's name or folder; the one that the adapter names by default.
        adapter_name: what the adapter is to be called in the model.
        revision: of the adapter's repository on the hub.
        token: for the hub, as huggingface_hub takes it; its own by default.
        **kwargs: for the base model's `from_pretrained`, such as `dtype`, `device_map` or `quantization_config`.

    Raises:
        ConfigurationError: no adapter there, a base model that cannot be found or read, or one whose tensors do not
            fit.
        MaskError: a damaged mask, or one that does not fit the adapter.

    Warns:
        FishTuningWarning: a head with another number of labels than the base model, whose names nothing tells; tensors
            that neither the base model's weights nor the adapter has, such as a pooler or a
            head; they are random, so the outputs are others at each loading. `predict` and `merge_adapter` refuse.

    Example:
        >>> model = load_adapter("results/x/adapters/lora-fish-seed42")  # doctest: +SKIP
    """
    model, random = _loaded(folder, is_trainable, base_model, adapter_name, revision, token, kwargs)
    if random:
        warnings.warn(f"{_random_text(random)} {_WAYS_OUT}", FishTuningWarning, stacklevel=2)
    return model


def load_whole_adapter(folder: str | os.PathLike[str], **loading: Any) -> PeftModel:
    """`load_adapter` for what random numbers make worthless: refuses where tensors come from nowhere."""
    names = ("base_model", "revision", "token")
    given = {name: loading.pop(name, None) for name in names}
    model, random = _loaded(folder, False, given["base_model"], "default", given["revision"], given["token"], loading)
    if random:
        raise ConfigurationError(f"{_random_text(random)} {_WAYS_OUT}")
    return model


def _loaded(
    folder: str | os.PathLike[str],
    is_trainable: bool,
    base_model: str | os.PathLike[str] | None,
    adapter_name: str,
    revision: str | None,
    token: str | bool | None,
    kwargs: Mapping[str, Any],
) -> tuple[PeftModel, list[str]]:
    """The model, and the names of its random tensors: neither the base model's weights nor the adapter has them."""
    path = fetched(folder, revision=revision, token=token)
    settings = read_adapter_config(path)
    check_weights(path)
    _make_known(settings["peft_type"], path)
    given = {} if token is None else {"token": token}
    asked = None if base_model is None else os.fspath(base_model)
    base, random = load_base(path, settings, asked, {**given, **kwargs})
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(base, str(path), adapter_name=adapter_name, is_trainable=is_trainable)
    # The last two are what values of a wrong type in adapter_config.json come to.
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError, TypeError, AttributeError) as error:
        lacking = "its weights lack " if isinstance(error, KeyError) else ""
        reason = lacking + _short(error)
        raise ConfigurationError(
            f"The adapter in {str(path)!r} does not fit {type(base).__name__}: {reason}"
        ) from error
    _check_complete(model, path, settings, told)
    if (length := length_beside(path)) is not None:
        setattr(model, LENGTH, length)  # for a sparse adapter that is made of the model
    if is_trainable and (path / MASK_FILE_NAME).is_file():
        check_saved_names(model, [adapter_name])
        _apply(model, load_mask(path), _weights(path), adapter_name)
    return model if is_trainable else model.eval(), random


def _short(error: BaseException) -> str:
    return textwrap.shorten(str(error), 300, placeholder=" …")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _make_known(peft_type: Any, path: Path) -> None:
    """Refuse a method that PEFT does not know, once it knows ours."""
    if peft_type in OWN_METHODS:
        importlib.import_module("fish_tuning.adapters")
    known = [str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING]
    if peft_type not in known:
        raise ConfigurationError(
            f"{str(path / ADAPTER_CONFIG)!r}: PEFT {peft_version} knows no method peft_type={peft_type!r}; a newer one "
            f"may.{did_you_mean(str(peft_type), known)}"
        )


def _check_complete(
    model: PeftModel, path: Path, settings: Mapping[str, Any], told: list[warnings.WarningMessage]
) -> None:
    """Refuse an adapter that lacks tensors of the model, which PEFT warns of; warn of some that the model lacks."""
    for warning in told:
        if "missing adapter keys" in str(warning.message):
            lacking = re.findall(r"'([^' ]+\.[^' ]+)'", str(warning.message))
            raise ConfigurationError(
                f"The adapter in {str(path)!r} does not fit {type(model.get_base_model()).__name__}: its weights lack "
                f"{_some(lacking)}. Give the base model that it was trained on with base_model=... (in the command "
                "--base-model)."
            )
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(settings["peft_type"])
    if not prefix:
        return
    modules = {name for name, _ in model.named_modules()}
    unused = sorted({name.partition(f".{prefix}")[0] for name in _weights(path) if f".{prefix}" in name} - modules)
    if unused:
        warnings.warn(
            f"The adapter in {str(path)!r} has weights for layers that {type(model.get_base_model()).__name__} lacks, "
            f"which are not used: {_some(unused)}. Is it the base model that it was trained on?",
            FishTuningWarning,
            stacklevel=4,
        )


def _random_text(names: list[str]) -> str:
    return (
        f"Neither the base model's weights nor the adapter has {_some(names)}: they are new random "
        "numbers at each loading, not those that the adapter was trained beside."
    )


def _apply(model: Any, mask: Mapping[str, Tensor], weights: Mapping[str, Tensor], adapter_name: str) -> None:
    names = {name for name, _ in model.named_parameters()}
    try:
        if not names.issuperset(mask):  # the adapter was called otherwise when it was saved
            mask = rename_adapter(mask, mask_adapter_name(mask, weights), adapter_name)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name not in mask:
                parameter.requires_grad_(
                    False
                )  # as it was while the mask was made: a factor that was left at its start
        apply_mask(model, mask)
    except MaskError as error:
        raise MaskError(f"The mask beside the adapter does not fit it: {error}") from error


def load_base(
    folder: Path, settings: Mapping[str, Any], asked: str | None, kwargs: Mapping[str, Any]
) -> tuple[Any, list[str]]:
    """An adapter's base model, and the names of its tensors that neither its weights nor the adapter has."""
    name = asked or settings.get("base_model_name_or_path")
    if not name:
        raise ConfigurationError(
            f"{str(folder / ADAPTER_CONFIG)!r} names no base model. Give load_adapter(..., base_model=...), in the "
            "command --base-model."
        )
    name = os.path.expanduser(name)
    if is_local(name) and not Path(name).is_dir():
        raise ConfigurationError(
            f"The adapter's base model {name!r} is a folder that is not here. Give its place, or its name on the hub: "
            "base_model=... (in the command --base-model)."
        )
    revision = None if asked else settings.get("revision")
    reached = base_arguments(name, revision, kwargs)
    own = folder / MODEL_CONFIG
    config = {"config": _own_config(own)} if (own / "config.json").is_file() else {}
    kind = _model_class(settings, config.get("config"))
    try:
        if config and settings.get("layer_replication"):
            # PEFT counts the layers that it repeats into the configuration; the base model has those of its own.
            layers = _base_config(name, revision, reached, kwargs).num_hidden_layers
            config["config"].num_hidden_layers = layers
        unsaid = kwargs.keys().isdisjoint(("config", "num_labels", "id2label", "label2id"))
        if not config and unsaid and "Classification" in kind.__name__:
            config = _config_for_head(folder, kind, name, revision, reached, kwargs)
        base, loading = kind.from_pretrained(
            name,
            revision=revision or "main",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **{**config, **reached, **kwargs},
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigurationError(
            f"The adapter's base model {name!r} cannot be loaded: {reason} Give its place or name with "
            "base_model=... (in the command --base-model)."
        ) from error
    carried = _carried(folder)
    _check_fit(base, name, carried, loading)
    return base, sorted(name for name in loading["missing_keys"] if not carried(name))


def _own_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ConfigurationError(
            f"{str(folder / 'config.json')!r}, the base model's configuration with the adapter's label names, cannot "
            f"be read: {_short(error)} Bring the folder anew, or remove {MODEL_CONFIG}: the labels then have no names."
        ) from error


def _base_config(name: str, revision: str | None, reached: Mapping[str, bool], given: Mapping[str, Any]) -> Any:
    own = {key: given[key] for key in ("token", "trust_remote_code") if given.get(key) is not None}
    return AutoConfig.from_pretrained(name, revision=revision or "main", **own, **reached)


def _config_for_head(
    folder: Path, kind: Any, name: str, revision: str | None, reached: Mapping[str, bool], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The base model's configuration with as many labels as the adapter's head has; nothing where it has as many."""
    config = _base_config(name, revision, reached, given)
    before, labels = config.num_labels, labels_of_head(kind, config, _weights(folder))
    if labels is None:
        return {}
    config.num_labels = labels
    names = f"LABEL_0 to LABEL_{labels - 1}" if labels > 1 else "LABEL_0"
    warnings.warn(
        f"The adapter's head has {labels} labels, its base model {name!r} {before}, and nothing beside the adapter "
        f"tells their names: they are called {names}. Give load_adapter(..., id2label={{0: ..., 1: ...}}); "
        "complete_adapter(model, folder) then writes them beside the adapter, for every later use.",
        FishTuningWarning, stacklevel=5,
    )  # fmt: skip
    return {"config": config}


def base_arguments(name: str, revision: str | None, given: Mapping[str, Any]) -> dict[str, bool]:
    """`hub_arguments` for an adapter's base model, of what `load_adapter` was given."""
    if given.get("local_files_only"):
        return {}
    return hub_arguments(
        name,
        revision=revision,
        token=given.get("token"),
        asked="The adapter's base model ",
        way_out="Give its folder with base_model=... (in the command --base-model).",
    )


def _carried(folder: Path) -> Callable[[str], bool]:
    """Whether the adapter brings the base model's tensor of this name: a head, trained biases, an embedding."""
    keys = set(_weights(folder))

    def carried(name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        # Methods that adapt layers put `model` between; of an adapted layer, its own weights are those of base_layer.
        return any(
            f"{prefix}{path}" in keys
            for prefix in ("base_model.model.", "base_model.")
            for path in (name, f"{module}.base_layer.{leaf}")
        )

    return carried


def _weights(folder: Path) -> dict[str, Tensor]:
    try:
        return dict(load_peft_weights(str(folder), device="cpu"))
    except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        reason = _short(error)
        raise ConfigurationError(f"The adapter in {str(folder)!r} cannot be read: {reason}") from error


def _check_fit(base: Any, name: str, carried: Callable[[str], bool], loading: Mapping[str, Any]) -> None:
    """Refuse weights of another shape, which transformers replaces by random ones, unless the adapter brings them."""
    lost = sorted(tensor for tensor, *_ in loading["mismatched_keys"] if not carried(tensor))
    if lost:
        raise ConfigurationError(
            f"The weights of {name!r} are not those that the adapter was made on: {lost[0]!r} has another shape in "
            f"{type(base).__name__}. Give the base model it was made on with base_model=... (in the "
            "command --base-model)."
        )


def _model_class(settings: Mapping[str, Any], config: Any) -> Any:
    """The class that the base model had: by its own name, else transformers' class for the task."""
    architectures = list(getattr(config, "architectures", None) or [])
    mapping = settings.get("auto_mapping") or {}
    for name in (*architectures[:1], mapping.get("base_model_class")):
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
            return kind
    if settings.get("task_type") in _AUTO_CLASSES:
        return getattr(transformers, _AUTO_CLASSES[settings["task_type"]])
    raise ConfigurationError(
        f"The adapter does not say what its base model is for: {ADAPTER_CONFIG} has no task_type of "
        f"{', '.join(_AUTO_CLASSES)}, and there is no {MODEL_CONFIG}/config.json. Load the base model, then "
        "PeftModel.from_pretrained(base, folder)."
    )
