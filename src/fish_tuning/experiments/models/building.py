"""From a model's name or folder to a PEFT model."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import logging as hub_logging
from peft import get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, set_seed

from fish_tuning.adapters import AdapterError
from fish_tuning.errors import ConfigurationError, did_you_mean
from fish_tuning.experiments.config.arm_names import HEAD_ALONE, Variant
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.methods import PeftMethodConfig
from fish_tuning.experiments.config.sections import ModelConfig
from fish_tuning.experiments.data.builtin import resolve_builtin
from fish_tuning.experiments.data.tasks import Task
from fish_tuning.experiments.models.base_weights import BaseWeights, train_base_weights
from fish_tuning.experiments.models.head_alone import freeze_all_but_head, head_alone_config
from fish_tuning.experiments.models.peft_methods import peft_config
from fish_tuning.experiments.models.placement import check_loaded_place, check_modules, loading_place, made_whole
from fish_tuning.experiments.models.quantized import kept_whole, loading_arguments, prepared, quantization_of
from fish_tuning.experiments.models.targets import head_names, linear_names
from fish_tuning.experiments.models.weights import WEIGHTS_FILES
from fish_tuning.peft_methods import peft_method
from fish_tuning.sharing.reaching import hub_arguments

# A part of a tensor's name that counts layers.
_LAYER_NUMBER = re.compile(r"\.\d+\.")
MOST_LAYERS = 10_000  # each is a module: more take hours to make, weights or none


def load_processing_class(config: ModelConfig, task: Task) -> Any:
    """The model's tokenizer or image processor, or None where the data carries the model's inputs."""
    if not task.encodes:
        return None
    if task.processor == "image_processor":
        return _from_hub(AutoImageProcessor, config.name, revision=config.revision)
    return load_tokenizer(config)


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer, with a padding token (the end token where the model has none)."""
    tokenizer = _from_hub(AutoTokenizer, config.name, revision=config.revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ConfigurationError(
            f"model.name: the tokenizer of {config.name!r} has neither a padding token nor an end token to pad with. "
            "Set pad_token in its tokenizer_config.json."
        )
    return tokenizer


def read_config(config: ModelConfig) -> Any:
    """The model's configuration as it is stored. Raises ConfigurationError for a wrong name or an unknown override."""
    loaded = _from_hub(AutoConfig, config.name, revision=config.revision)
    unknown = [key for key in config.config_overrides if not hasattr(loaded, key)]
    if unknown:
        raise ConfigurationError(
            f"model.config_overrides: {type(loaded).__name__} has no {unknown[0]!r}."
            f"{did_you_mean(unknown[0], loaded.to_dict())}"
        )
    return loaded


def check_weights(config: ModelConfig) -> None:
    """Refuse a local folder without weights; counting does not need them, training does."""
    folder = Path(os.path.expanduser(config.name))
    if folder.is_dir() and not any((folder / name).is_file() for name in WEIGHTS_FILES):
        raise ConfigurationError(
            f"model.name: the folder {config.name!r} holds no weights; one of {', '.join(WEIGHTS_FILES)} is needed. "
            "Save the model there with save_pretrained, or use --dry-run, which counts without weights."
        )


def load_config(config: ModelConfig, task: Task, pad_token_id: int | None, loaded: Any = None) -> Any:
    """The transformers configuration (`loaded`, where it was read already) with the task's labels and the overrides."""
    if loaded is None:
        loaded = read_config(config)
    task.configure(loaded)
    if pad_token_id is not None:  # a decoder that classifies reads its last token before the padding
        loaded.pad_token_id = pad_token_id
    for key, value in config.config_overrides.items():
        if "layer" in key and type(value) is int and value > MOST_LAYERS:
            raise ConfigurationError(
                f"model.config_overrides.{key}={value}: {MOST_LAYERS} layers are the most that are made; the model has "
                f"{getattr(loaded, key)}."
            )
        try:
            setattr(loaded, key, value)
        except (StrictDataclassError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigurationError(f"model.config_overrides.{key}={value!r} is not allowed: {reason}") from error
    return loaded


@made_whole()
def build_model(
    config: ExperimentConfig,
    model_config: Any,
    task: Task,
    section: PeftMethodConfig,
    variant: Variant,
    *,
    seed: int,
    device: torch.device | None = None,
) -> Any:
    """The PEFT model that an arm starts from. The same seed and method give the same model, bit for bit."""
    base = build_base_model(config, model_config, task, seed=seed, device=device)
    set_seed(seed)
    return put_adapter(config, base, peft_config_of(config, section, base, variant), section)


@made_whole()
def build_base_model(
    config: ExperimentConfig, model_config: Any, task: Task, *, seed: int, device: torch.device | None = None
) -> Any:
    """The pretrained model with the task's head, which the seed decides.

    Quantised weights are loaded to `device`, all others to the CPU, unless `model.device_map` says where.
    """
    quantization = quantization_of(config.model, model_config)
    whole = (
        []
        if quantization is None
        else kept_whole(_without_weights(config, model_config, task), quantization, brings_head=task.brings_head)
    )
    set_seed(seed)
    base, loading = _from_hub(
        _auto_class(task),
        config.model.name,
        revision=config.model.revision,
        dtype=getattr(torch, config.model.dtype),
        ignore_mismatched_sizes=True,  # a head of another task's size is replaced by a new one
        output_loading_info=True,
        **loading_arguments(config.model, model_config, whole),
        **loading_place(config.model, device, quantized=quantization is not None),
    )
    _check_loaded(config.model, base, loading)
    check_loaded_place(base)
    return prepared(base)


@made_whole()
def model_to_look_at(config: ExperimentConfig, model_config: Any, task: Task) -> Any:
    """The model with the task's head, without weights and without an adapter."""
    return _without_weights(config, model_config, task)


def _without_weights(config: ExperimentConfig, model_config: Any, task: Task, device: str = "meta") -> Any:
    """Raises ConfigurationError where the configuration makes no model, or none for the task."""
    where = (
        f"model.name: no model can be made from the configuration of {config.model.name!r} with "
        f"model.config_overrides={config.model.config_overrides}: "
    )
    try:
        with torch.device(device):
            return _auto_class(task).from_config(copy.deepcopy(model_config), dtype=getattr(torch, config.model.dtype))
    except ImportError as error:  # of what a configuration asks for, such as an attention of another package
        raise ConfigurationError(
            f"{where}a package is missing: {_first_line(error)} Install it, or ask for something else."
        ) from error
    except (ValueError, TypeError, RuntimeError, KeyError, ZeroDivisionError) as error:
        if "Unrecognized configuration class" in str(error):
            raise ConfigurationError(
                f"model.name: transformers has no {task.auto_class} of {config.model.name!r} "
                f"({model_config.model_type}), which {task.kind} needs. Name a model that has one, or set dataset.task "
                "to what this one is for."
            ) from error
        raise ConfigurationError(f"{where}{_first_line(error)}") from error


def peft_config_of(config: ExperimentConfig, section: PeftMethodConfig, base: Any, variant: Variant) -> Any:
    """The configuration, of PEFT or `BaseWeights`, that a method or the arm of the head alone puts on `base`."""
    if section.method == HEAD_ALONE:
        return head_alone_config(base)
    return peft_config(config, section, base, variant)


def put_adapter(config: ExperimentConfig, base: Any, adapter: Any, section: PeftMethodConfig) -> Any:
    """The PEFT model, with what the arm trains; for `base`, the model itself."""
    if isinstance(adapter, BaseWeights):
        return train_base_weights(base, adapter)
    model = get_peft_model(base, adapter)
    if section.method == HEAD_ALONE:
        freeze_all_but_head(model)
    elif config.freezes_A(section):
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    return model


@made_whole()
def build_meta_model(
    config: ExperimentConfig, model_config: Any, task: Task, section: PeftMethodConfig, variant: Variant
) -> Any:
    """The same model without weights, to count on: costs no memory and needs no weights file.

    A method that computes with weights when it is put on gets random ones.
    """
    try:
        return _counting_model(config, model_config, task, section, variant, "meta")
    except _NoAdapter:
        return _counting_model(config, model_config, task, section, variant, "cpu")


class _NoAdapter(ConfigurationError):
    """The adapter could not be put on the model."""


def _counting_model(
    config: ExperimentConfig, model_config: Any, task: Task, section: PeftMethodConfig, variant: Variant, device: str
) -> Any:
    with torch.device(device):
        base = _without_weights(config, model_config, task, device)
        check_modules(config.model, base)
        adapter = peft_config_of(config, section, base, variant)
        if peft_method(section.method).takes_init_lora_weights:
            vars(adapter)["init_lora_weights"] = True  # the others compute with weights, which are not there
        try:
            return put_adapter(config, base, adapter, section)
        except AdapterError as error:  # names what there is and what to set by itself
            raise _NoAdapter(f"peft.method={section.method!r}: {error}") from error
        except Exception as error:  # PEFT's methods raise whatever comes: the user needs the reason, not the place
            reason = f"peft.method={section.method!r} cannot adapt {type(base).__name__}: {_first_line(error)}"
            targets = getattr(adapter, "target_modules", None)
            if targets and "target" in str(error):
                reason = (
                    f"{reason.rstrip('.')}. Asked for were {targets if isinstance(targets, str) else sorted(targets)}; "
                    f"its linear layers are {', '.join(linear_names(base))}. Set lora.target_modules or "
                    "peft.args.target_modules."
                )
            raise _NoAdapter(reason) from error


def state_digest(model: nn.Module) -> str:
    """Digest of every trainable tensor, and of the A beside a trained B: whether two arms start from the same one."""
    digest = hashlib.sha256()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in sorted(model.named_parameters()):
        if name in trained or (".lora_A." in name and name.replace(".lora_A.", ".lora_B.") in trained):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_loaded(config: ModelConfig, base: Any, loading: dict[str, Any]) -> None:
    """Refuse an encoder that was not loaded: transformers fills what does not fit with random numbers.

    Some checkpoints lack a small part such as the pooler, so that alone is fine; a numbered layer must be there.
    """
    head = head_names(base)

    def outside(names: set[str]) -> list[str]:
        return sorted(name for name in names if name.partition(".")[0] not in head)

    sizes = {name: tensor.numel() for name, tensor in base.state_dict().items()}
    mismatched = outside({name for name, *_ in loading["mismatched_keys"]})
    missing = outside(loading["missing_keys"])
    lacking = sum(sizes.get(name, 0) for name in missing)
    layers = [name for name in missing if _LAYER_NUMBER.search(name)]
    if mismatched:
        wrong, names = "have another shape than the model", mismatched
    elif layers or (missing and not head) or 2 * lacking > sum(sizes[name] for name in outside(set(sizes))):
        wrong, names = "are not among them", layers or missing
    else:
        return
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    overrides = f" with model.config_overrides={config.config_overrides}" if config.config_overrides else ""
    raise ConfigurationError(
        f"model.name: the weights of {config.name!r} do not fit {type(base).__name__}{overrides}: outside the head, "
        f"{len(names)} of its {len(sizes)} tensors {wrong} ({shown}); they would be random. Give the model's own "
        "weights, and leave its sizes out of model.config_overrides."
    )


def _auto_class(task: Task) -> Any:
    return getattr(transformers, task.auto_class)


def _from_hub(auto_class: Any, name: str, **kwargs: Any) -> Any:
    path = os.path.expanduser(resolve_builtin(name, weights=auto_class is not AutoConfig))
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise ConfigurationError(f"model.name: there is no folder {name!r}.")
    reached = hub_arguments(
        path, revision=kwargs.get("revision"), asked="model.name: ", way_out="Give a local folder's path."
    )
    try:
        with _quiet_hub():
            return auto_class.from_pretrained(
                path, **reached, **{key: value for key, value in kwargs.items() if value is not None}
            )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        hint = (
            ""
            if Path(path).is_dir()
            else " Give a local folder's path or a hub name; without network, HF_HUB_OFFLINE=1 uses what is cached "
            "and does not wait."
        )
        raise ConfigurationError(f"model.name: {name!r} cannot be loaded: {_first_line(error)}{hint}") from error


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without the hub's warning at each retry: what went wrong in the end is told once."""
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
