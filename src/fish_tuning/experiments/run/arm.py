"""One arm with one seed: build the model, score it, mask it, train it, measure it."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from fish_tuning.errors import FishTuningError
from fish_tuning.experiments.config.arm_names import ArmName, Selection
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.sections import PeftMethodConfig
from fish_tuning.experiments.models.building import build_model, state_digest
from fish_tuning.experiments.records.run_record import ArmPlan, KeptShare, RunRecord
from fish_tuning.experiments.run.arguments import early_stopping_arguments, training_arguments
from fish_tuning.experiments.run.loggers import NO_REPORTS, open_loggers, run_name
from fish_tuning.experiments.run.measure import PeakMemory, optimizer_state_bytes
from fish_tuning.experiments.run.plan import Plan, names_outside_pool
from fish_tuning.files.mask_file import MASK_FILE_NAME, save_mask
from fish_tuning.masks.budgets import matching_names, module_type
from fish_tuning.masks.create import create_mask_from_fisher
from fish_tuning.scores.fisher import calculate_fisher_information
from fish_tuning.sparse.masked_tensors import Mask, count_trainable_parameters
from fish_tuning.training.trainer import FishMaskCallback

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """Scores of one starting point, and what they cost."""

    scores: dict[str, Tensor]
    seconds: float
    initial_state: str


@dataclass
class ArmRun:
    """`run` does it; `calibration` is given by an earlier arm of the same seed, or made when one is needed."""

    config: ExperimentConfig
    plan: Plan
    arm: ArmPlan
    seed: int
    train: Dataset
    validation: Dataset
    progress: TrainerCallback
    calibration: Calibration | None = None
    learning_rate: float | None = None
    more_validation: Mapping[str, Dataset] = field(default_factory=dict)
    reports: bool = True  # to the loggers that `report_to` names

    def run(self, folder: Path, config_hash: str) -> RunRecord:
        name = f"{self.arm.arm}-seed{self.seed}"
        adapter = folder / "adapters" / name
        shutil.rmtree(adapter, ignore_errors=True)  # of an earlier configuration
        args = self._arguments(folder / "checkpoints" / name)
        model = build_model(
            self.config,
            self.plan.model_config,
            self.plan.task,
            self._section,
            self.config.variant_of(self.arm.arm),
            seed=self.seed,
        )
        initial_state = state_digest(model)
        mask = self._mask(model, initial_state, args)
        trainer = self._trainer(model, args, mask)
        trainable = count_trainable_parameters(model)
        if trainable != self.arm.trainable_parameters:
            raise FishTuningError(
                f"{self.arm.arm} trains {trainable:,} parameters where {self.arm.trainable_parameters:,} were planned."
            )
        set_seed(self.seed)  # the same data order and dropout in every arm, whatever scoring drew
        peak = PeakMemory()
        with open_loggers(trainer, folder / "logs" / name, self._figures):
            started = time.perf_counter()
            trainer.train()
            train_seconds = time.perf_counter() - started
            peak_memory = peak.bytes()
            metrics = self._evaluate(trainer)
        if self._patience:
            shutil.rmtree(folder / "checkpoints" / name, ignore_errors=True)
        _remove_empty(folder / "checkpoints" / name)
        return RunRecord(
            arm=self.arm.arm,
            seed=self.seed,
            status="ok",
            metric=self.plan.metric,
            value=metrics[self.plan.metric],
            metrics=metrics,
            trainable_parameters=trainable,
            train_seconds=train_seconds,
            fisher_seconds=self._figures["fisher_seconds"],
            peak_memory_bytes=peak_memory,
            peak_memory_of=peak.of,
            optimizer_state_bytes=optimizer_state_bytes(trainer.optimizer) if trainer.optimizer else 0,
            adapter_bytes=_save(model, mask, adapter),
            kept=kept_shares(mask, names_outside_pool(self.config, self.plan.task)) if mask else [],
            config_hash=config_hash,
            initial_state=initial_state,
            experiment=self.config.name,
            task=self.plan.task.name,
            model=self.config.model.name,
            keep_ratio=self._figures.get("keep_ratio"),
            learning_rate=args.learning_rate,
            loss_curve=[(int(entry["step"]), entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        )

    @property
    def _section(self) -> PeftMethodConfig:
        return self.config.method_of(self.arm.arm)

    @property
    def _selection(self) -> Selection | None:
        return ArmName.parse(self.arm.arm).selection

    @property
    def _needs_scores(self) -> bool:
        return self._selection is not None and self._selection.method != "rand"

    @property
    def _figures(self) -> dict[str, float]:
        seconds = self.calibration.seconds if self.calibration and self._needs_scores else 0.0
        ratio = {} if self._selection is None else {"keep_ratio": self.arm.kept / self.arm.pool}
        return {**ratio, "fisher_seconds": seconds}

    def _arguments(self, folder: Path, extra: Mapping[str, Any] | None = None) -> TrainingArguments:
        chosen = {} if self.learning_rate is None else {"learning_rate": self.learning_rate}
        stopping = early_stopping_arguments(self.plan.metric) if self._patience and not extra else {}
        reports = {} if self.reports else NO_REPORTS
        own = {**self.plan.task.training_arguments, **self._section.training_args}
        arguments = training_arguments(
            self.config, self.seed, folder, {**own, **chosen, **stopping, **reports, **(extra or {})}
        )
        arguments.run_name = run_name(self.config, self.arm.arm, self.seed, arguments.run_name)
        return arguments

    @property
    def _patience(self) -> int | None:
        return self.config.training.early_stopping_patience

    def _mask(self, model: Any, initial_state: str, args: TrainingArguments) -> Mask | None:
        if self._selection is None:
            return None
        if self._needs_scores:
            if self.calibration is None:
                self.calibration = self._calibrate(model, initial_state, args)
            if self.calibration.initial_state != initial_state:
                raise FishTuningError("The scores belong to another starting point than the one to be trained.")
            scores: Mapping[str, Tensor] = self.calibration.scores
        else:
            scores = {n: torch.zeros(()).expand(p.shape) for n, p in model.named_parameters() if p.requires_grad}
        return create_mask_from_fisher(
            scores,
            names_to_exclude=names_outside_pool(self.config, self.plan.task),
            num_trainable=self.arm.trainable_parameters,
            method=self._selection.method,
            quotas=(self.config.fish_tuning.quotas or "module_type") if self._selection.quotas else None,
            normalize="module_type" if self._selection.normalize else None,
            seed=self.seed,
        )

    def _calibrate(self, model: Any, initial_state: str, args: TrainingArguments) -> Calibration:
        started = time.perf_counter()
        steps = self.config.warmup_steps(self.arm.method)
        start = copy.deepcopy(model.state_dict()) if steps else None
        if start is not None:
            self._warm_up(model, str(args.output_dir), steps)
        scores = calculate_fisher_information(
            model, self._calibration_loader(args.per_device_train_batch_size), device=args.device, progress=False
        )
        if start is not None:
            model.load_state_dict(start)
        return Calibration(scores, time.perf_counter() - started, initial_state)

    def _warm_up(self, model: Any, folder: str, steps: int) -> None:
        """Some dense steps, so that no factor is zero when it is scored; undone afterwards."""
        settings = {"max_steps": steps, "eval_strategy": "no", "save_strategy": "no", **NO_REPORTS}
        arguments = self._arguments(Path(folder), settings)
        set_seed(self.seed)
        self._make_trainer(model, arguments, []).train()

    def _calibration_loader(self, batch_size: int) -> DataLoader[Any]:
        """The seed's calibration examples; scores are exact whatever their order, so equal lengths go together."""
        examples = self.train.shuffle(seed=self.seed).select(range(self.config.fish_tuning.num_samples))
        if "input_ids" in examples.column_names:
            lengths = [len(ids) for ids in examples["input_ids"]]
            examples = examples.select(sorted(range(len(examples)), key=lengths.__getitem__))
        collator = self.plan.task.collator(self.plan.processing_class)
        return DataLoader(examples, batch_size=batch_size, collate_fn=collator)

    def _trainer(self, model: Any, args: TrainingArguments, mask: Mask | None) -> Trainer:
        callbacks: list[TrainerCallback] = [self.progress]
        if mask is not None:
            callbacks.append(FishMaskCallback(mask))
        if self._patience:
            callbacks.append(EarlyStoppingCallback(early_stopping_patience=self._patience))
        return self._make_trainer(model, args, callbacks)

    def _make_trainer(self, model: Any, args: TrainingArguments, callbacks: list[TrainerCallback]) -> Trainer:
        trainer = self.plan.task.make_trainer(
            model=model,
            args=args,
            train_dataset=self.train,
            eval_dataset=self.validation,
            processing_class=self.plan.processing_class,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)  # it prints every log to standard output
        return trainer

    def _evaluate(self, trainer: Trainer) -> dict[str, float]:
        metrics = trainer.evaluate(metric_key_prefix="eval")
        names = ("loss", *self.plan.task.metrics, "perplexity")
        found = {name: float(metrics[f"eval_{name}"]) for name in names if f"eval_{name}" in metrics}
        for kind, split in self.more_validation.items():
            prefix = f"eval_{kind}"
            more = trainer.evaluate(split, metric_key_prefix=prefix)
            found |= {f"{name}_{kind}": float(more[f"{prefix}_{name}"]) for name in names if f"{prefix}_{name}" in more}
        for name in ("loss", self.plan.metric):
            if not math.isfinite(found[name]):
                raise FishTuningError(
                    f"After {trainer.state.global_step} steps the evaluation's {name} is {found[name]}: training "
                    "diverged or every prediction is the same. Try a lower learning rate."
                )
        return found


def _save(model: Any, mask: Mask | None, folder: Path) -> int:
    """Bytes of the adapter's weights file, as PEFT writes it; the mask goes beside it."""
    model.save_pretrained(folder)
    if mask is not None:
        save_mask(mask, folder / MASK_FILE_NAME)
    return (folder / "adapter_model.safetensors").stat().st_size


def _remove_empty(checkpoints: Path) -> None:
    """The Trainer makes its folder even when it saves no checkpoint."""
    with contextlib.suppress(OSError):
        checkpoints.rmdir()
        checkpoints.parent.rmdir()


def kept_shares(mask: Mask, names_to_exclude: Sequence[str]) -> list[KeptShare]:
    """Kept and total entries of the pool by layer number and module type (`query.lora_A`, weight and bias together)."""
    counts: dict[tuple[int | None, str], list[int]] = {}
    for name in mask.keys() - matching_names(mask, names_to_exclude):
        number = re.search(r"\.(\d+)\.", name)
        count = counts.setdefault((int(number.group(1)) if number else None, module_type(name)), [0, 0])
        count[0] += int(mask[name].sum())
        count[1] += mask[name].numel()
    shares = [KeptShare(layer, module, kept, total) for (layer, module), (kept, total) in counts.items()]
    return sorted(shares, key=lambda share: (-1 if share.layer is None else share.layer, share.module))
