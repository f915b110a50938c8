"""From a model's name or folder to a PEFT model: configuration, head, LoRA targets."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    set_seed,
)

from fish_tuning.errors import ConfigurationError, did_you_mean
from fish_tuning.experiments.builtin import resolve_builtin
from fish_tuning.experiments.config import ExperimentConfig, ModelConfig
from fish_tuning.experiments.data import Task

# The attention input projections under the names that model families give them; the first set found is the default.
ATTENTION_PROJECTIONS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("query_key_value",),
    ("Wqkv",),
    ("qkv_proj",),
    ("c_attn",),
)


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer, with a padding token (the end token where the model has none)."""
    tokenizer = _from_hub(AutoTokenizer, config.name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(config: ModelConfig, task: Task, pad_token_id: int | None) -> Any:
    """The transformers configuration with the task's labels and the overrides in it."""
    loaded = _from_hub(AutoConfig, config.name)
    unknown = [key for key in config.config_overrides if not hasattr(loaded, key)]
    if unknown:
        raise ConfigurationError(
            f"model.config_overrides: {type(loaded).__name__} has no {unknown[0]!r}."
            f"{did_you_mean(unknown[0], loaded.to_dict())}"
        )
    if task.labels:
        loaded.id2label = dict(enumerate(task.labels))
        loaded.label2id = {label: number for number, label in enumerate(task.labels)}
        loaded.problem_type = "single_label_classification"
    else:
        loaded.num_labels = 1
        loaded.problem_type = "regression"
    if getattr(loaded, "pad_token_id", None) is None and pad_token_id is not None:
        loaded.pad_token_id = pad_token_id
    for key, value in config.config_overrides.items():
        setattr(loaded, key, value)
    return loaded


def build_model(config: ExperimentConfig, model_config: Any, task: Task, rank: int, *, seed: int) -> Any:
    """The PEFT model that an arm starts from. The same seed and rank give the same model, bit for bit."""
    set_seed(seed)
    base = _from_hub(
        _auto_class(task),
        config.model.name,
        config=model_config,
        dtype=getattr(torch, config.model.dtype),
        ignore_mismatched_sizes=True,  # a head of another task's size is replaced by a new one
    )
    set_seed(seed)
    return get_peft_model(base, _lora_config(config, base, rank, config.lora.init_lora_weights))


def build_meta_model(config: ExperimentConfig, model_config: Any, task: Task, rank: int) -> Any:
    """The same model without weights, to count on: costs no memory and needs no weights file."""
    with torch.device("meta"):
        base = _auto_class(task).from_config(model_config, dtype=getattr(torch, config.model.dtype))
        lora = _lora_config(config, base, rank, init_lora_weights=True)
        try:
            return get_peft_model(base, lora)
        except ValueError as error:
            raise ConfigurationError(
                f"lora.target_modules: {lora.target_modules} cannot be adapted in {type(base).__name__}, whose linear "
                f"layers are {', '.join(_linear_names(base))}. ({error})"
            ) from error


def target_modules(config: ExperimentConfig, model: nn.Module) -> list[str] | str:
    """The asked LoRA targets, else the attention's input projections."""
    if config.lora.target_modules is not None:
        asked = config.lora.target_modules
        if not isinstance(asked, str):
            for target in asked:
                if not any(name == target or name.endswith(f".{target}") for name, _ in model.named_modules()):
                    names = _linear_names(model)
                    raise ConfigurationError(
                        f"lora.target_modules: {type(model).__name__} has no module {target!r}; its linear layers are "
                        f"{', '.join(names)}.{did_you_mean(target, names)}"
                    )
        return asked
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for projections in ATTENTION_PROJECTIONS:
        if present.issuperset(projections):
            return list(projections)
    model_type = getattr(model.config, "model_type", "")
    if model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        return list(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type])
    raise ConfigurationError(
        f"lora.target_modules: no usual attention projection was found in {type(model).__name__}, whose linear layers "
        f"are {', '.join(_linear_names(model))}. Set lora.target_modules."
    )


def state_digest(model: nn.Module) -> str:
    """Digest of every trainable tensor, to tell whether two arms start from the same one."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _lora_config(config: ExperimentConfig, base: nn.Module, rank: int, init_lora_weights: Any) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=config.lora.dropout,
        target_modules=target_modules(config, base),
        modules_to_save=_head_names(base),
        init_lora_weights=init_lora_weights,
    )


def _head_names(base: nn.Module) -> list[str]:
    """The modules beside the encoder: those that the task brings, new and trained as a whole."""
    return [
        name
        for name, child in base.named_children()
        if name != base.base_model_prefix and any(True for _ in child.parameters())
    ]


def _auto_class(task: Task) -> Any:
    return AutoModelForImageClassification if task.kind == "image" else AutoModelForSequenceClassification


def _from_hub(auto_class: Any, name: str, **kwargs: Any) -> Any:
    path = os.path.expanduser(resolve_builtin(name))
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise ConfigurationError(f"model.name: there is no folder {name!r}.")
    try:
        return auto_class.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigurationError(f"model.name: {name!r} cannot be loaded: {reason}") from error


def _linear_names(model: nn.Module) -> list[str]:
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
