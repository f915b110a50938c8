"""The costs of all arms of an experiment, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.arm_names import ArmName
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.costs.arm_costs import Files, Measured, Work, measure, spread
from fish_tuning.experiments.costs.batches import Shapes, first_rows, largest_batch
from fish_tuning.experiments.costs.devices import STRATEGIES, DeviceCosts, device_costs
from fish_tuning.experiments.costs.kernels import matmul_workspace
from fish_tuning.experiments.costs.quantized import stored_weights_of
from fish_tuning.experiments.costs.unknown_values import experts_of
from fish_tuning.experiments.data.tasks import CausalLM
from fish_tuning.experiments.models.building import build_meta_model
from fish_tuning.experiments.records.run_record import ArmPlan
from fish_tuning.experiments.run.arguments import training_arguments
from fish_tuning.experiments.run.plan import Plan, names_outside_pool
from fish_tuning.masks.budgets import matching_names
from fish_tuning.masks.selections import SELECTIONS
from fish_tuning.sharing.lengths import positions_of

DEVICES = (1, 2, 4, 8)
KINDS = ("cpu", "cuda")


@dataclass(frozen=True)
class ArmCosts:
    """What an arm needs. Bytes; None where a model could not be traced, or where the arm has no such thing.

    Args:
        trainable_parameters: that its optimizer holds, head included.
        weights: on one device: the model, the trained values, and the positions of the selected entries.
        positions: of `weights`, those positions.
        scores: of all entries of the pool, where they are scored; they are on the CPU while the arm trains.
        calibration_peak: of warm-up and scoring, weights included.
        devices: memory and traffic for each number of devices.
    """

    arm: str
    trainable_parameters: int
    weights: int
    positions: int
    gradients: int
    optimizer: int
    activations: int | None
    scores: int | None
    calibration_peak: int | None
    devices: tuple[DeviceCosts, ...]
    files: Files


@dataclass(frozen=True)
class ExperimentCosts:
    """The costs of an experiment's arms, the batch they are of, and what was assumed."""

    experiment: str
    model: str
    kind: str
    strategy: str
    batch: dict[str, list[int]]
    arms: tuple[ArmCosts, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_devices(text: str) -> list[int]:
    """`1,2,8` as numbers. Raises ConfigurationError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) < 10**6 for part in parts):
        raise ConfigurationError(f"--devices {text}: must be whole numbers from 1, such as 1,2,8.")
    return list(dict.fromkeys(map(int, parts)))


def plannable(config: ExperimentConfig, kind: str | None) -> ExperimentConfig:
    """The experiment as it can be planned here: for a GPU also on a machine that has none, and would refuse it."""
    if kind != "cuda" or torch.accelerator.is_available():
        return config

    def changed(values: dict[str, Any]) -> dict[str, Any]:
        half = {"fp16": False, "bf16": True} if values.get("fp16") else {}  # as many bytes
        return {name: value for name, value in values.items() if name != "tf32"} | half

    own = changed(config.training.args_override) | {"use_cpu": True}
    model = config.model.model_copy(update={"device_map": None, "max_memory": None})  # which name devices of elsewhere
    peft = [section.model_copy(update={"training_args": changed(section.training_args)}) for section in config.peft]
    data = config.dataset.model_copy(update={"training_args": changed(config.dataset.training_args)})
    training = config.training.model_copy(update={"args_override": own})
    return config.model_copy(update={"model": model, "training": training, "peft": peft, "dataset": data})


def experiment_costs(
    config: ExperimentConfig,
    plan: Plan,
    *,
    devices: Sequence[int] = DEVICES,
    strategy: str = "ddp",
    kind: str | None = None,
    tokens: int | None = None,
) -> ExperimentCosts:
    """What each arm needs on one of so many devices; nothing is loaded, and no weights are made.

    Args:
        config: the experiment.
        plan: from `plan_experiment(config)`.
        devices: numbers of devices.
        strategy: ddp, fsdp, zero2 or zero3: how training is spread over them.
        kind: cpu or cuda, whose kernels are planned for; by default that on which the experiment would train here.
        tokens: length of the longest text, where the training set's own is not to count.

    Raises:
        ConfigurationError: for values that are not allowed, and as `build_meta_model`.
    """
    check_options(devices, strategy, kind, tokens)
    positions = positions_of(plan.model_config)
    if tokens is not None and positions is not None and tokens > positions:
        raise ConfigurationError(
            f"--tokens {tokens}: {config.model.name!r} has {positions} positions. Give as many tokens or fewer."
        )
    first = _arguments(config, plan, plan.arms[0])
    kind = kind or ("cpu" if first.device.type == "cpu" else "cuda")
    planner = _Planner(config, plan, kind == "cuda", tokens)
    arms = tuple(_of_arm(arm, planner.measured(arm), devices, strategy, planner.scores(arm)) for arm in plan.arms)
    batch = {name: list(tensor.shape) for name, tensor in planner.batch(plan.arms[0]).items()}
    notes = tuple(dict.fromkeys([*planner.notes, *_notes(first, planner.batch(plan.arms[0]), planner.gpu)]))
    return ExperimentCosts(config.name, config.model.name, kind, strategy, batch, arms, notes)


def check_options(devices: Sequence[int], strategy: str, kind: str | None, tokens: int | None) -> None:
    """Raise ConfigurationError for what is not allowed."""
    if strategy not in STRATEGIES:
        raise ConfigurationError(f"--strategy {strategy}: allowed are {', '.join(STRATEGIES)}.")
    if kind is not None and kind not in KINDS:
        raise ConfigurationError(f"--on {kind}: allowed are {', '.join(KINDS)}.")
    if not devices or min(devices) < 1:
        raise ConfigurationError(f"--devices {list(devices)}: must be whole numbers from 1, such as 1,2,8.")
    if tokens is not None and tokens < 1:
        raise ConfigurationError(f"--tokens {tokens}: must be a whole number from 1.")


def _arguments(config: ExperimentConfig, plan: Plan, arm: ArmPlan) -> Any:
    own = {**plan.task.training_arguments, **config.method_of(arm.arm).training_args}
    return training_arguments(config, config.seeds[0], Path(config.training.output_dir), own)


class _Planner:
    """Measures arms; those that train as many entries of the same adapter are measured once."""

    def __init__(self, config: ExperimentConfig, plan: Plan, gpu: bool, tokens: int | None) -> None:
        self.config, self.plan, self.gpu, self.tokens = config, plan, gpu, tokens
        self.notes: list[str] = []
        self._known: dict[Any, Measured] = {}
        self._batches: dict[int, Shapes] = {}
        self._quantization = stored_weights_of(
            getattr(config.model, "quantization_config", None), getattr(plan.model_config, "quantization_config", None)
        )
        if self._quantization is not None and not self._quantization.measured:
            self.notes.append(f"Weights in {self._quantization.name} are assumed to take that, with scales by group.")

    def batch(self, arm: ArmPlan) -> Shapes:
        size = _arguments(self.config, self.plan, arm).per_device_train_batch_size
        if size not in self._batches:
            task, length = self.plan.task, self.config.training.max_seq_length
            self._batches[size] = largest_batch(task, self.plan.processing_class, length, size, self.tokens)
        return self._batches[size]

    def scores(self, arm: ArmPlan) -> bool:
        selection = ArmName.parse(arm.arm).selection
        return selection is not None and SELECTIONS.find(selection.name).needs_scores

    def measured(self, arm: ArmPlan) -> Measured:
        """Of all arms that train as many entries of the same adapter, with what scoring costs if one of them scores."""
        key = self._key(arm)
        if key not in self._known:
            section, variant = self.config.method_of(arm.arm), self.config.variant_of(arm.arm)
            model = build_meta_model(self.config, self.plan.model_config, self.plan.task, section, variant)
            choice, batch = self.config.choice_of_arm(arm.arm), self.batch(arm)
            if experts := experts_of(model):
                self.notes.append(f"Tokens are taken to be spread evenly over the {experts} experts of a layer.")
            scored = any(self.scores(other) for other in self.plan.arms if self._key(other) == key)
            work = Work(
                model=model,
                kept=self._kept(arm, model) if arm.selection is not None else {},
                has_mask=arm.selection is not None,
                args=_arguments(self.config, self.plan, arm),
                batch=batch,
                calibration=first_rows(batch, choice.num_samples),
                quantization=self._quantization,
                score=choice.score if scored else None,
                warmup_steps=self.config.warmup_steps(section),
                fused_head=isinstance(self.plan.task, CausalLM),
                gpu=self.gpu,
            )
            self._known[key] = measure(work)
        found = self._known[key]
        self.notes += [f"{arm.arm}: {failure}." for failure in found.failures]
        if found.state.assumed:
            self.notes.append(found.state.assumed)
        return found

    def _key(self, arm: ArmPlan) -> Any:
        section = self.config.method_of(arm.arm)
        # Arms without scores of their own are told with those that have the method's.
        score = self.config.choice_of_arm(arm.arm).score
        return section.name, self.config.variant_of(arm.arm), None if arm.selection is None else (arm.kept, score)

    def _kept(self, arm: ArmPlan, model: Any) -> dict[str, int]:
        """Of each tensor that a mask leaves entries out of."""
        sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        outside = matching_names(sizes, names_outside_pool(self.config, self.plan.task, arm.method, arm.settings))
        pool = {name: size for name, size in sizes.items() if name not in outside}
        return {name: count for name, count in spread(arm.kept, pool).items() if count < pool[name]}


def _of_arm(arm: ArmPlan, found: Measured, devices: Sequence[int], strategy: str, scored: bool) -> ArmCosts:
    sizes, live = found.sizes, found.live
    calibration = found.calibration if scored else None
    beside = sizes.gradients if sizes.accumulates > 1 else None
    peak = None if live is None else lambda share: live.peak(share, beside)
    weights = sizes.parameters + sizes.replicated
    activations = None if live is None else live.most_activations
    return ArmCosts(
        arm=arm.arm,
        trainable_parameters=arm.trainable_parameters,
        weights=weights,
        positions=found.masked,
        gradients=sizes.gradients,
        optimizer=sizes.optimizer,
        activations=activations,
        scores=None if calibration is None else calibration.scores,
        calibration_peak=None if calibration is None else weights - found.masked + calibration.peak + sizes.workspace,
        devices=tuple(device_costs(sizes, strategy, number, activations, peak) for number in devices),
        files=found.files,
    )


def _notes(args: Any, batch: Shapes, gpu: bool) -> list[str]:
    shapes = ", ".join(f"{name} {'x'.join(map(str, tensor.shape))}" for name, tensor in batch.items())
    notes = [f"A batch of one device: {shapes}."]
    if gpu:
        notes.append(f"Peaks hold {matmul_workspace() / 1e6:.1f} MB that cuBLAS keeps for products of matrices.")
    if args.gradient_accumulation_steps > 1:
        notes.append(f"Gradients are accumulated over {args.gradient_accumulation_steps} batches.")
    return notes
