"""What an experiment will train, counted from the model without its weights, before anything is trained."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fish_tuning.budgets import matching_names, resolve_budget
from fish_tuning.errors import ConfigurationError, MaskError
from fish_tuning.experiments.arguments import training_arguments
from fish_tuning.experiments.config import ARMS, STARTS_AT_ZERO, ExperimentConfig
from fish_tuning.experiments.data import Task, load_task, tokenize
from fish_tuning.experiments.metrics import main_metric
from fish_tuning.experiments.models import build_meta_model, load_config, load_tokenizer, read_config
from fish_tuning.experiments.records import ArmPlan

RECORDED_PACKAGES = ("fish-tuning", "torch", "transformers", "peft", "datasets")
# Model types whose position embeddings start after the padding token's number.
NUMBERED_AFTER_PADDING = (
    "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "data2vec-text", "xmod", "mpnet",
    "longformer", "esm", "ibert", "luke", "layoutlmv3",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A checked experiment: its arms with their counts, its data, and facts for the reader."""

    arms: list[ArmPlan]
    facts: dict[str, Any]
    notes: list[str]
    task: Task
    tokenizer: Any
    model_config: Any

    @property
    def metric(self) -> str:
        return main_metric(self.task.name, self.task.num_labels)


def plan_experiment(config: ExperimentConfig) -> Plan:
    """Load the data and the model's configuration, and count every arm on a model without weights.

    Raises ConfigurationError for whatever cannot work: missing data, columns or targets, a budget below the head.
    """
    # What needs no data comes first: a wrong model name should not cost a download.
    training_arguments(config, config.seeds[0], Path(config.training.output_dir))  # refuses what would fail later
    most = config.dataset.max_train_samples
    if most is not None and config.fish_tuning.num_samples > most:
        raise ConfigurationError(
            f"fish_tuning.num_samples={config.fish_tuning.num_samples} is more than dataset.max_train_samples={most}; "
            "lower the first or raise the second."
        )
    stored = read_config(config.model)
    task = load_task(config.dataset)
    tokenizer = load_tokenizer(config.model) if task.text_columns else None
    model_config = load_config(config.model, task, getattr(tokenizer, "pad_token_id", None), stored)
    if task.text_columns:
        _check_length(config, task, tokenizer, model_config)
    baseline = build_meta_model(config, model_config, task, config.lora.baseline_rank)
    pooled = build_meta_model(config, model_config, task, config.lora.fish_rank)
    arms = [_plan_arm(config, arm, baseline, pooled) for arm in config.fish_tuning.methods_to_run]
    if config.fish_tuning.num_samples > len(task.train):
        raise ConfigurationError(
            f"fish_tuning.num_samples={config.fish_tuning.num_samples} is more than the {len(task.train)} training "
            "examples."
        )
    return Plan(arms, _facts(config, task, baseline), _notes(config), task, tokenizer, model_config)


def _check_length(config: ExperimentConfig, task: Task, tokenizer: Any, model_config: Any) -> None:
    """Refuse texts longer than the model's positions; tokenises only where max_seq_length would let such texts pass."""
    asked = config.training.max_seq_length
    positions = _positions(model_config)
    if positions is None or asked <= positions:
        return
    longest = max(len(ids) for split in tokenize(task, tokenizer, asked) for ids in split["input_ids"])
    if longest > positions:
        raise ConfigurationError(
            f"training.max_seq_length={asked} lets a text of {longest} tokens pass, more than the {positions} "
            f"positions of {config.model.name!r}; set it to {positions} or less."
        )


def _positions(model_config: Any) -> int | None:
    """How many tokens the model has positions for; None where it sets no bound."""
    positions = getattr(model_config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:  # relative positions only
        return None
    if model_config.model_type in NUMBERED_AFTER_PADDING:
        positions -= (model_config.pad_token_id or 0) + 1
    return positions


def _plan_arm(config: ExperimentConfig, arm: str, baseline: Any, pooled: Any) -> ArmPlan:
    method = ARMS[arm]
    model = baseline if method is None else pooled
    rank = config.lora.baseline_rank if method is None else config.lora.fish_rank
    sizes = _trainable_sizes(model)
    outside = matching_names(sizes, config.lora.names_to_exclude)
    dense = sum(sizes[name] for name in outside)
    pool = sum(sizes.values()) - dense
    kept = pool if method is None else _budget(config, _total(baseline), pool, dense)
    return ArmPlan(arm, method, rank, trainable_parameters=kept + dense, pool=pool, kept=kept, dense=dense)


def _budget(config: ExperimentConfig, baseline_total: int, pool: int, dense: int) -> int:
    ratio = config.fish_tuning.prune_to_ratio_of_baseline
    try:
        return resolve_budget(pool, dense, num_trainable=round(ratio * baseline_total))
    except MaskError as error:
        raise ConfigurationError(
            f"fish_tuning.prune_to_ratio_of_baseline={ratio} of the baseline's {baseline_total:,} trainable parameters "
            f"(rank {config.lora.baseline_rank}, head included) cannot be met at lora.fish_rank="
            f"{config.lora.fish_rank}: {error}"
        ) from error


def _trainable_sizes(model: Any) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _total(model: Any) -> int:
    return sum(_trainable_sizes(model).values())


def _facts(config: ExperimentConfig, task: Task, model: Any) -> dict[str, Any]:
    targets = model.peft_config["default"].target_modules
    return {
        "task": task.name,
        "metric": main_metric(task.name, task.num_labels),
        "train_examples": len(task.train),
        "validation_examples": len(task.validation),
        "validation_split": task.validation_split,
        "text_columns": list(task.text_columns),
        "num_labels": task.num_labels,
        "model_type": model.config.model_type,
        "target_modules": sorted(targets) if isinstance(targets, set | list) else targets,
        "init_lora_weights": config.lora.init_lora_weights,
        "num_samples": config.fish_tuning.num_samples,
        "warmup_steps_before_scoring": config.warmup_steps,
        "device": _device(),
        "versions": {name: version(name) for name in RECORDED_PACKAGES} | {"python": platform.python_version()},
    }


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({torch.get_num_threads()} threads)"


def _notes(config: ExperimentConfig) -> list[str]:
    notes = []
    if config.lora.init_lora_weights in STARTS_AT_ZERO and not config.warmup_steps:
        notes.append(
            "B starts at 0, where every A scores exactly zero: FISH can only choose among B. Leave out "
            "fish_tuning.warmup_steps=0, or set lora.init_lora_weights to 'pissa'."
        )
    return notes
