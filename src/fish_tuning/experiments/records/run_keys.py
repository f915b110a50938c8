"""What a run depends on, as short keys: a finished run is not repeated while its key stays the same.

A key holds contents, no paths: of the data and the weights, the model's configuration, the arm, the training arguments,
versions of packages and the kind of device. What cannot change a result is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fish_tuning.experiments.config.arm_names import ArmName
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.methods import LOOKS_AT_DATA
from fish_tuning.experiments.records.run_record import ArmPlan
from fish_tuning.experiments.records.shared_keys import SEEDS, digest, effective_arguments, method_own, of_all_arms
from fish_tuning.masks.selections import SELECTIONS
from fish_tuning.scores.warmup import WARMUP_LEARNING_RATE

# Of configurations: paths, versions, and of which class and dtype the weights were saved, where others may be loaded.
_NOT_SETTINGS = (
    "_name_or_path", "base_model_name_or_path", "revision", "transformers_version", "peft_version", "inference_mode",
    "architectures", "dtype", "torch_dtype",
)  # fmt: skip


class RunKeys(NamedTuple):
    """`run` is of one run; `setting` is the same for all seeds, and for all learning rates chosen from one list.

    `common` is the same for all arms and seeds of an experiment, and `method_own` for those of one method, which may
    have training arguments and learning rates of its own: only runs that agree in both are told apart by their arms.
    """

    run: str
    setting: str
    common: str
    method_own: str


def run_keys(
    config: ExperimentConfig,
    arm: ArmPlan,
    arguments: Mapping[str, Any],
    shared: Mapping[str, Any],
    of_all: Mapping[str, Any] | None = None,
) -> RunKeys:
    """The keys of one arm with one seed.

    Args:
        config: the experiment.
        arm: of its plan.
        arguments: the run's whole TrainingArguments, seed included.
        shared: what all runs depend on: contents of data and weights, versions and the like.
        of_all: the arguments of an arm whose method changes none of them; the run's own if not given.
    """
    parts = {**shared, **_arm_parts(config, arm, arguments), "arguments": effective_arguments(arguments)}
    section = config.method_of(arm.arm)
    seedless = _seedless(config, parts["arguments"], config.learning_rates_of(section))
    common = {
        **shared,
        "arguments": _seedless(
            config, effective_arguments(arguments if of_all is None else of_all), config.training.learning_rates
        ),
        **of_all_arms(config.model_dump(mode="json")),
    }
    own = method_own(section.model_dump(mode="json"))
    return RunKeys(digest(parts), digest({**parts, "arguments": seedless}), digest(common), own)


def _seedless(config: ExperimentConfig, arguments: Mapping[str, Any], rates: list[float]) -> dict[str, Any]:
    """Training arguments without the seed, and with all rates where one is chosen of several."""
    seedless = {name: value for name, value in arguments.items() if name not in SEEDS}
    if len(rates) > 1:
        seeds = config.training.trial_seeds
        how = ["by loss"] if config.training.choose_by == "loss" else []
        how += [f"{seeds} seeds"] if seeds > 1 else []
        seedless["learning_rate"] = [*rates, *how]
    return seedless


def plain_settings(settings: Any) -> Any:
    """A configuration without paths and versions, however deep."""
    if not isinstance(settings, Mapping):
        return settings
    return {str(name): plain_settings(value) for name, value in settings.items() if name not in _NOT_SETTINGS}


def _arm_parts(config: ExperimentConfig, arm: ArmPlan, arguments: Mapping[str, Any]) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "method": arm.method,
        "selection": arm.selection,
        "settings": plain_settings(arm.settings),
        "trainable_parameters": arm.trainable_parameters,
        "early_stopping_patience": config.training.early_stopping_patience,
    }
    if arguments.get("dataloader_drop_last"):
        parts["measured"] = "all rows"  # earlier versions left some out
    if config.training.head_learning_rate is not None:
        parts["head_learning_rate"] = config.training.head_learning_rate
    section = config.method_of(arm.arm)
    choice = config.choice_of_arm(arm.arm)
    init = config.initialisation(arm.arm)
    if init is not None:
        parts["init_lora_weights"] = init  # which settings, made without weights, lack
    if config.freezes_A(section):
        parts["freeze_A"] = True
    if init in LOOKS_AT_DATA:
        parts["num_samples"] = choice.num_samples
    selection = ArmName.parse(arm.arm).selection
    if selection is not None:
        parts["names_to_exclude"] = config.lora.names_to_exclude
        parts |= {"quotas": choice.quotas} if selection.quotas else {}
        parts |= {"floors": choice.floors} if choice.floors and not selection.quotas else {}
        parts |= {"granularity": choice.granularity} if choice.granularity != "entry" else {}
        if SELECTIONS.find(selection.name).needs_scores:
            parts |= {"score": choice.score, "num_samples": choice.num_samples}
            parts |= {"warmup_steps": config.warmup_steps(section), "warmup_learning_rate": WARMUP_LEARNING_RATE}
            parts |= {"reselect_every": choice.reselect_every} if choice.reselect_every else {}
            # Earlier versions scored without the Trainer's autocast.
            precision = next((name for name in ("bf16", "fp16") if arguments.get(name)), None)
            parts |= {"scored_in": precision} if precision else {}
    return parts
