"""What an experiment will train, counted from the model without its weights, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fish_tuning.errors import ConfigurationError, MaskError
from fish_tuning.experiments.config.arm_names import HEAD_ALONE, ArmName
from fish_tuning.experiments.config.choices import ChoiceConfig
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.methods import HEAD_PATTERN
from fish_tuning.experiments.config.secrets import keep_names
from fish_tuning.experiments.data.tasks import Task, TokenClassification, encode, load_task
from fish_tuning.experiments.models.base_weights import own_head
from fish_tuning.experiments.models.building import load_config, load_processing_class, read_config
from fish_tuning.experiments.models.meta_models import MetaModels
from fish_tuning.experiments.models.peft_methods import check_method, size_text
from fish_tuning.experiments.models.placement import check_device_map
from fish_tuning.experiments.models.quantized import (
    Quantization,
    check_quantized,
    is_installed,
    quantization_of,
)
from fish_tuning.experiments.records.run_record import ArmPlan
from fish_tuning.experiments.run.adalora import entries_planned
from fish_tuning.experiments.run.arguments import check_best, optimizer_missing, training_arguments
from fish_tuning.experiments.run.plan_facts import loss_notes, plan_facts, plan_notes
from fish_tuning.experiments.run.plan_samples import check_batches, check_most_samples, check_samples, usable_examples
from fish_tuning.masks.budgets import matching_names, resolve_budget
from fish_tuning.masks.create import check_choice
from fish_tuning.peft_methods import ADALORA, peft_method
from fish_tuning.sharing.lengths import check_room, positions_of


@dataclass(frozen=True)
class Plan:
    """A checked experiment: its arms with their counts, its data, and facts for the reader. Nothing changes it."""

    arms: tuple[ArmPlan, ...]
    facts: Mapping[str, Any]
    notes: tuple[str, ...]
    task: Task
    processing_class: Any  # the model's tokenizer or image processor; None where the data is ready
    model_config: Any
    quantization: Quantization | None = None  # of the base weights

    @property
    def metric(self) -> str:
        return self.task.metric

    def arm(self, name: str) -> ArmPlan:
        """The arm of that name. Raises KeyError where there is none."""
        return {arm.arm: arm for arm in self.arms}[name]


def plan_experiment(config: ExperimentConfig) -> Plan:
    """Load the data and the model's configuration, and count every arm on a model without weights.

    Raises ConfigurationError for whatever cannot work: missing data, columns or targets, a budget below the head.
    """
    # What needs no data comes first: a wrong model name should not cost a download.
    training_arguments(config, config.seeds[0], Path(config.training.output_dir))  # that methods change
    of_methods = []
    for section in config.peft:
        check_method(section)
        # refuses what would fail later
        arguments = training_arguments(config, config.seeds[0], Path(config.training.output_dir), section.training_args)
        of_methods.append(arguments)
        check_device_map(config.model, arguments.device, arguments.world_size)
    check_most_samples(config)
    stored = read_config(config.model)
    quantization = quantization_of(config.model, stored)
    check_quantized(config, quantization)
    task = load_task(config.dataset)
    keep_names([task.kind, *task.metrics])
    if not config.training.early_stopping_patience:  # which has its own
        for arguments in of_methods:
            check_best(arguments, task.metrics)
    processing_class = load_processing_class(config.model, task)
    model_config = load_config(config.model, task, getattr(processing_class, "pad_token_id", None), stored)
    notes = task.check(processing_class, model_config, config.training.max_seq_length)
    if task.processor == "tokenizer" and processing_class is not None:
        _check_vocabulary(config, processing_class, model_config)
        _check_length(config, task, processing_class, model_config)
    models = MetaModels(config, model_config, task)
    arms = tuple(_plan_arm(config, arm, models) for arm in _arms(config, task))
    examples = usable_examples(config, task, processing_class)
    check_samples(config, task, examples)
    check_batches(config, of_methods, examples)
    facts = MappingProxyType(plan_facts(config, task, models, quantization))
    notes = [
        *notes,
        *plan_notes(config, task, arms),
        *loss_notes(of_methods, arms),
        *filter(None, dict.fromkeys(map(optimizer_missing, of_methods))),
    ]
    if not is_installed(quantization):
        notes.append("bitsandbytes is not installed; a run needs it: pip install 'fish-tuning[quantized]'.")
    return Plan(arms, facts, tuple(notes), task, processing_class, model_config, quantization)


def _arms(config: ExperimentConfig, task: Task) -> list[str]:
    """Without the head where the task brings none."""
    arms = [arm for arm in config.arms if arm != HEAD_ALONE or task.brings_head]
    if not arms:
        raise ConfigurationError(
            f"fish_tuning.methods_to_run: {HEAD_ALONE} trains a new head, and {task.kind} brings none; name another "
            "arm, such as lora."
        )
    return arms


def _check_vocabulary(config: ExperimentConfig, tokenizer: Any, model_config: Any) -> None:
    """Refuse an override that leaves the tokenizer's tokens without an embedding."""
    asked = config.model.config_overrides.get("vocab_size")
    if asked is not None and model_config.vocab_size < len(tokenizer):
        raise ConfigurationError(
            f"model.config_overrides.vocab_size={asked} is less than the {len(tokenizer):,} tokens of the tokenizer of "
            f"{config.model.name!r}. Leave it out."
        )


def _check_length(config: ExperimentConfig, task: Task, tokenizer: Any, model_config: Any) -> None:
    """Refuse a length without room for a text, and texts longer than the model's positions.

    Tokenises only where max_seq_length would let such texts pass.
    """
    asked = config.training.max_seq_length
    if task.encodes and task.brings_head:
        columns = 1 if task.kind == TokenClassification.kind else len(task.columns)
        check_room(tokenizer, "training.max_seq_length", asked, columns)
    positions = positions_of(model_config)
    if positions is None or asked + task.tokens_written <= positions:
        return
    encoded = encode(task, tokenizer, asked)
    longest = max(len(ids) for split in (encoded.train, encoded.validation) for ids in split["input_ids"])
    prompt = task.longest_prompt(encoded.validation)
    if prompt + task.tokens_written > positions:
        raise ConfigurationError(
            f"dataset.max_new_tokens={task.tokens_written} after a prompt of {prompt} tokens is more than the "
            f"{positions} positions of {config.model.name!r}; set it to {positions - prompt} or less, or leave out "
            "long prompts."
        )
    if longest > positions:
        raise ConfigurationError(
            f"training.max_seq_length={asked} lets a text of {longest} tokens pass, more than the {positions} "
            f"positions of {config.model.name!r}; set it to {positions} or less."
        )


def _plan_arm(config: ExperimentConfig, arm: str, models: MetaModels) -> ArmPlan:
    name = ArmName.parse(arm)
    sizes, settings = _trainable_sizes(models(arm)), _plain(models.settings(arm).to_dict())
    method = config.method_of(arm).method
    if arm == HEAD_ALONE:
        head = sum(sizes.values())
        return ArmPlan(arm, HEAD_ALONE, None, "-", settings, head, pool=0, kept=0, dense=head)
    outside = matching_names(sizes, names_outside_pool(config, models.task, method, settings))
    dense = sum(sizes[tensor] for tensor in outside)
    pool = {tensor: size for tensor, size in sizes.items() if tensor not in outside}
    total = sum(pool.values())
    if name.selection is not None:
        known = peft_method(method)
        if reason := known.cannot_be_masked or known.cannot_be_scored:
            raise ConfigurationError(
                f"fish_tuning.methods_to_run: {arm} cannot run: {reason} Its dense arm, {name.method}, can."
            )
        kept = _budget(config, name, models, total, dense)
    else:
        kept = entries_planned(models(arm)) if method == ADALORA else total
    if name.selection is not None:
        shapes = {tensor: tuple(models(arm).get_parameter(tensor).shape) for tensor in pool}
        _check_choice(config.choice_of(config.method_of(arm)), name, shapes, kept)
    return ArmPlan(
        arm=arm,
        method=method,
        selection=name.suffix or None,
        size=size_text(models.settings(arm)),
        settings=settings,
        trainable_parameters=kept + dense,
        pool=total,
        kept=kept,
        dense=dense,
    )


def names_outside_pool(config: ExperimentConfig, task: Task, method: str, settings: Mapping[str, Any]) -> list[str]:
    """`lora.names_to_exclude`, its pattern for new heads put into the names that an arm's model has for them."""
    own = own_head(method, settings)
    heads = [] if not task.brings_head else [HEAD_PATTERN] if own is None else own
    return [
        name for pattern in config.lora.names_to_exclude for name in (heads if pattern == HEAD_PATTERN else [pattern])
    ]


def _budget(config: ExperimentConfig, name: ArmName, models: MetaModels, pool: int, dense: int) -> int:
    if config.protocol == "fixed_layers":
        return resolve_budget(pool, dense, keep_ratio=float(name.budget))
    if config.protocol == "fixed_count":
        count = int(name.count or 0)
        if count > pool:
            size = size_text(models.settings(str(name)))
            raise ConfigurationError(
                f"fish_tuning.kept_parameters={count:,}: the pool of {name.method} ({size}) has {pool:,} entries. "
                "Lower it, or enlarge the pool with peft.args."
            )
        return count
    baseline = sum(_trainable_sizes(models(name.baseline)).values())
    ratio = config.fish_tuning.prune_to_ratio_of_baseline if config.protocol == "ratio_of_baseline" else 1.0
    try:
        return resolve_budget(pool, dense, num_trainable=round(ratio * baseline))
    except MaskError as error:
        sizes = [size_text(models.settings(arm)) for arm in (name.baseline, str(name))]
        asked = f"fish_tuning.prune_to_ratio_of_baseline={ratio} of " if config.protocol == "ratio_of_baseline" else ""
        raise ConfigurationError(
            f"{asked}the {baseline:,} trainable parameters that {name.baseline} has ({sizes[0]}, head included) cannot "
            f"be met by {name} ({sizes[1]}): {error} Sizes are set by lora.baseline_rank and lora.fish_rank, or by "
            "peft.baseline_args and peft.fish_args."
        ) from error


def _check_choice(choice: ChoiceConfig, name: ArmName, shapes: dict[str, tuple[int, ...]], kept: int) -> None:
    """Refuse what create_mask_from_fisher would refuse once the scores are there."""
    of_quotas = name.selection is not None and name.selection.quotas
    quotas = (choice.quotas or "module_type") if of_quotas else None
    floors = None if of_quotas else choice.floors
    try:
        check_choice(shapes, kept, granularity=choice.granularity, quotas=quotas, floors=floors)
    except MaskError as error:
        key = str(error).partition(":")[0].partition("=")[0]
        known = key in ("quotas", "floors", "granularity")
        raise ConfigurationError(f"fish_tuning.{error}" if known else f"{name}: {error}") from error


def _plain(value: Any) -> Any:
    """Sorted lists instead of sets, text instead of enumerations: what JSON can hold, the same every time."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _trainable_sizes(model: Any) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
