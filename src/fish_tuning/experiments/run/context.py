"""What the runs of an experiment share: plain data and small functions of it, handed to every arm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.arm_names import HEAD_ALONE
from fish_tuning.experiments.config.choices import ChoiceConfig
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.sections import ModelConfig
from fish_tuning.experiments.data.digests import data_digest
from fish_tuning.experiments.data.tasks import Encoded, encode
from fish_tuning.experiments.models.quantized import check_installed
from fish_tuning.experiments.models.weights import weights_digest
from fish_tuning.experiments.records.record_files import run_name
from fish_tuning.experiments.records.run_keys import RunKeys, plain_settings, run_keys
from fish_tuning.experiments.records.run_record import ArmPlan
from fish_tuning.experiments.run.arguments import (
    as_one_model,
    check_optimizer,
    early_stopping_arguments,
    training_arguments,
)
from fish_tuning.experiments.run.calibration_examples import calibration_loader
from fish_tuning.experiments.run.deepspeed import check_deepspeed
from fish_tuning.experiments.run.fsdp import check_fsdp, is_on, load_whole_weights
from fish_tuning.experiments.run.launch import Launch, this_launch
from fish_tuning.experiments.run.loggers import NO_REPORTS, logged_name
from fish_tuning.experiments.run.plan import Plan
from fish_tuning.experiments.run.starts import Starts


@dataclass(frozen=True)
class Context:
    """All that a run needs beside its arm and seed.

    Args:
        config: the experiment.
        plan: its checked plan.
        data: the encoded splits.
        folder: where adapters, checkpoints and logs go.
        shared: what every run's key holds: contents of data and weights, versions and the like.
        starts: gives the model that an arm with a seed starts from.
        progress: told of every training step.
        is_trial: of a learning rate: nothing is reported to loggers, and no adapter is kept.
    """

    config: ExperimentConfig
    plan: Plan
    data: Encoded
    folder: Path
    shared: Mapping[str, Any]
    starts: Starts
    progress: TrainerCallback
    is_trial: bool = False

    def arguments(
        self, arm: ArmPlan, seed: int, learning_rate: float | None = None, extra: Mapping[str, Any] | None = None
    ) -> TrainingArguments:
        """The TrainingArguments of one run; `extra` goes over them, for what is no training to the end."""
        config = self.config
        chosen = {} if learning_rate is None else {"learning_rate": learning_rate}
        stops = config.training.early_stopping_patience and not extra
        stopping = early_stopping_arguments(self.plan.metric) if stops else {}
        reports = NO_REPORTS if self.is_trial else {}
        task = self.plan.task
        averages = {"average_tokens_across_devices": task.average_tokens_across_devices}
        unsaid = averages.keys().isdisjoint(config.training.args_override)
        own = {
            **(averages if unsaid and this_launch().number > 1 else {}),
            **task.training_arguments,
            **config.method_of(arm.arm).training_args,
        }
        arguments = training_arguments(
            config, seed, self.checkpoints(arm, seed), {**own, **chosen, **stopping, **reports, **(extra or {})}
        )
        arguments.run_name = logged_name(config, arm.arm, seed, arguments.run_name)
        stays = config.model.device_map is not None or self.plan.quantization is not None
        return as_one_model(arguments) if stays else arguments

    def choice(self, arm: ArmPlan) -> ChoiceConfig:
        """How the arm's entries are chosen."""
        return self.config.choice_of_arm(arm.arm)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Digests of the data and of the base weights, by the names that reports have for them."""
        return {"data_fingerprint": str(self.shared["data"]), "weights_fingerprint": str(self.shared["weights"])}

    @property
    def head_learning_rate(self) -> float | None:
        """The head's own rate; None where it has that of all else, or the task brings no head."""
        return self.config.training.head_learning_rate if self.plan.task.brings_head else None

    def keys(self, arm: ArmPlan, seed: int, learning_rate: float | None) -> RunKeys:
        """The keys of one run."""
        arguments = self.arguments(arm, seed, learning_rate)
        rates = self.config.training.learning_rates
        of_all = self.arguments(replace(arm, arm=HEAD_ALONE), seed, rates[0] if rates else None)
        shared = {**self.shared, "device": arguments.device.type}
        return run_keys(self.config, arm, _values(arguments), shared, _values(of_all))

    def join(self, launch: Launch) -> None:
        """Let the processes of a launch meet, as the first TrainingArguments' device does.

        Raises ConfigurationError where they would not train together, and as `check_fsdp`.
        """
        arguments = self.arguments(self.plan.arms[0], self.config.seeds[0])
        if arguments.world_size != launch.number:
            raise ConfigurationError(
                f"{launch.number} processes were launched, but transformers would train in {arguments.world_size} "
                f"({arguments.device}). Give each process a device of its own, or set "
                "training.args_override.use_cpu=true."
            )
        for arm in self.plan.arms:
            asked = self.arguments(arm, self.config.seeds[0])
            check_fsdp(asked, self.config)
            check_deepspeed(asked, self.config)
        load_whole_weights()

    def calibration_loader(self, arm: ArmPlan, seed: int, batch_size: int) -> DataLoader[Any]:
        """The examples that a seed's scores are of."""
        return calibration_loader(self.plan, self.data, self.choice(arm).num_samples, seed, batch_size)

    def checkpoints(self, arm: ArmPlan, seed: int) -> Path:
        return self.folder / "checkpoints" / run_name(arm.arm, seed)


def _values(arguments: TrainingArguments) -> dict[str, Any]:
    """All that a run's key may hold of its arguments."""
    # Several GPUs of one process share each step's batch.
    values = {**arguments.to_dict(), "train_batch_size": arguments.train_batch_size}
    if arguments.world_size > 1:
        values |= {"world_size": arguments.world_size}
    return {**values, **_of_accelerate(arguments)}


def _of_accelerate(arguments: TrainingArguments) -> dict[str, Any]:
    """What `accelerate launch` and DeepSpeed's settings decide, where the arguments themselves do not say it."""
    own = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "no"
    decided: dict[str, Any] = {"fsdp": True} if not arguments.fsdp and is_on("ACCELERATE_USE_FSDP") else {}
    plugin: Any = getattr(arguments, "deepspeed_plugin", None)
    if plugin is not None:  # what a file of settings says, which may clip, or choose an optimizer; not where it lies
        decided["deepspeed"] = plain_settings(plugin.deepspeed_config)
    precision = getattr(arguments, "mixed_precision", own)
    return {**({"mixed_precision": precision} if precision != own else {}), **decided}


def make_context(config: ExperimentConfig, plan: Plan, progress: TrainerCallback) -> Context:
    """Encode the data and find out what all runs depend on.

    Raises ConfigurationError for weights that cannot be loaded.
    """
    check_installed(plan.quantization)
    data = encode(plan.task, plan.processing_class, config.training.max_seq_length)
    shared = {
        "data": data_digest(data.train, data.validation, *data.more_validation.values()),
        "more_validation": list(data.more_validation),
        "weights": weights_digest(config.model),
        "model": plain_settings(plan.model_config.to_dict()),
        "dtype": config.model.dtype,
        "processing": _processing(plan.processing_class),
        "task": plan.task.kind,
        "metric": plan.metric,
        "tokens_written": plan.task.tokens_written,
        "versions": plan.facts["versions"],
        **_loaded_otherwise(config.model, plan),
    }
    folder = Path(config.training.output_dir)
    context = Context(config, plan, data, folder, shared, Starts(config, plan, data), progress)
    for arm in plan.arms:
        check_optimizer(context.arguments(arm, config.seeds[0]))
    return context


def _loaded_otherwise(model: ModelConfig, plan: Plan) -> dict[str, Any]:
    """What has to be said of weights that are not loaded as they are stored; nothing of others."""
    asked = plan.quantization is not None and not plan.quantization.is_stored  # else the model's configuration says it
    quantization = {"quantization_config": dict(plan.quantization.settings)} if asked and plan.quantization else {}
    places = {"device_map": model.device_map, "max_memory": model.max_memory}
    return {**quantization, **{name: value for name, value in places.items() if value is not None}}


def _processing(processing_class: Any) -> dict[str, Any]:
    """How batches are made of encoded rows: an image processor's settings, a tokenizer's padding."""
    if hasattr(processing_class, "to_dict"):
        return {str(name): value for name, value in processing_class.to_dict().items()}
    names = ("padding_side", "pad_token_id", "bos_token_id", "eos_token_id")
    return {name: getattr(processing_class, name, None) for name in names}
