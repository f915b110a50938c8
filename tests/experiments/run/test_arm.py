from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, TrainerCallback

from fish_tuning import load_mask
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.data.tasks import encode
from fish_tuning.experiments.records.run_record import KeptShare, RunRecord
from fish_tuning.experiments.run.arm import ArmRun, Calibration, kept_shares
from fish_tuning.experiments.run.plan import Plan, plan_experiment

MakeExperiment = Callable[..., ExperimentConfig]


class Spy(ArmRun):
    """Notes the ids of every training batch, the scored weights and the weights that training starts from."""

    def _make_trainer(self, model: Any, args: Any, callbacks: list[TrainerCallback]) -> Any:
        trainer = super()._make_trainer(model, args, callbacks)
        self.batches: list[list[list[int]]] = []  # the last trainer's: warm-up comes before
        step = trainer.training_step

        def noted(model: Any, inputs: Any, *rest: Any) -> Any:
            self.batches.append(inputs["input_ids"].tolist())
            return step(model, inputs, *rest)

        trainer.training_step = noted
        return trainer


def arms(config: ExperimentConfig, plan: Plan, folder: Path) -> dict[str, tuple[RunRecord, Spy]]:
    train, validation = encode(plan.task, plan.processing_class, 16)[:2]
    calibration: Calibration | None = None
    done = {}
    for arm in plan.arms:
        run = Spy(config, plan, arm, 1, train, validation, TrainerCallback(), calibration)
        done[arm.arm] = (run.run(folder, "key"), run)
        calibration = run.calibration
    return done


def test_arms_of_a_seed_differ_in_the_mask_alone(experiment: MakeExperiment, tmp_path: Path) -> None:
    config = experiment("lora.dropout=0.1")
    plan = plan_experiment(config)
    done = arms(config, plan, tmp_path)
    lora, *masked = done.values()
    assert all(record.status == "ok" for record, _ in done.values())
    assert len({record.initial_state for record, _ in masked}) == 1
    assert all(run.batches == lora[1].batches for _, run in masked)
    assert len(lora[1].batches) == 3
    counts = {name: record.trainable_parameters for name, (record, _) in done.items()}
    assert counts == {arm.arm: arm.trainable_parameters for arm in plan.arms}
    # AdamW keeps two numbers an entry, and a step counter (fp32) a tensor.
    for record, _ in done.values():
        assert record.optimizer_state_bytes is not None
        assert 0 <= record.optimizer_state_bytes - 8 * (record.trainable_parameters or 0) <= 4 * 26
    seconds = [record.fisher_seconds for record, _ in masked]
    assert seconds[0] == seconds[2] != 0  # fish and rev share one scoring
    assert (lora[0].fisher_seconds, seconds[1]) == (0, 0)


def test_adapters_are_saved_with_their_masks_and_load_in_stock_peft(
    experiment: MakeExperiment, tmp_path: Path, bert_folder: Path
) -> None:
    config = experiment("fish_tuning.methods_to_run=[lora-fish]", "lora.init_lora_weights=true")
    done = arms(config, plan_experiment(config), tmp_path)
    record, _ = done["lora-fish"]
    folder = tmp_path / "adapters" / "lora-fish-seed1"
    assert record.adapter_bytes == (folder / "adapter_model.safetensors").stat().st_size
    mask = load_mask(folder / "fish_mask.safetensors")
    assert sum(int(selected.sum()) for selected in mask.values()) == record.trainable_parameters
    base = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=2)
    loaded = PeftModel.from_pretrained(base, folder)
    assert sum(p.numel() for n, p in loaded.named_parameters() if "lora_" in n) == 2 * 3 * 4 * 32


def test_warm_up_scores_elsewhere_but_trains_from_the_start(experiment: MakeExperiment, tmp_path: Path) -> None:
    settings = ["fish_tuning.methods_to_run=[lora-fish]", "lora.init_lora_weights=true"]
    cold, warm = (experiment(*settings, f"fish_tuning.warmup_steps={steps}") for steps in (0, 3))
    cold_run = arms(cold, plan_experiment(cold), tmp_path / "cold")["lora-fish"]
    warm_run = arms(warm, plan_experiment(warm), tmp_path / "warm")["lora-fish"]
    assert cold_run[0].initial_state == warm_run[0].initial_state
    assert warm_run[1].calibration is not None
    assert cold_run[1].calibration is not None
    a_scores = [
        sum(float(s.sum()) for n, s in run.calibration.scores.items() if "lora_A" in n)  # type: ignore[union-attr]
        for run in (cold_run[1], warm_run[1])
    ]
    assert a_scores[0] == 0 < a_scores[1]


def test_scores_of_another_start_are_refused(experiment: MakeExperiment, tmp_path: Path) -> None:
    config = experiment("fish_tuning.methods_to_run=[lora-fish]")
    plan = plan_experiment(config)
    train, validation = encode(plan.task, plan.processing_class, 16)[:2]
    other = Calibration({}, 0.0, "another")
    run = ArmRun(config, plan, plan.arms[0], 1, train, validation, TrainerCallback(), other)
    with pytest.raises(Exception, match="another starting point"):
        run.run(tmp_path, "key")


def test_kept_shares_tell_layer_and_module() -> None:
    mask = {
        "base_model.model.bert.encoder.layer.3.attention.self.query.lora_A.default.weight": torch.tensor([True, False]),
        "base_model.model.classifier.modules_to_save.default.weight": torch.ones(2, dtype=torch.bool),
    }
    assert kept_shares(mask, ["modules_to_save"]) == [KeptShare(layer=3, module="query.lora_A", kept=1, total=2)]
