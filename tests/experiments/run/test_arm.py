from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from fish_tuning import ConfigurationError, load_mask
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.records.record_files import adapter_digests
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.run import arm as arm_module
from fish_tuning.experiments.run.arm import run_arm
from fish_tuning.experiments.run.calibration import Calibration
from fish_tuning.experiments.run.context import Context, make_context
from fish_tuning.experiments.run.plan import plan_experiment

MakeExperiment = Callable[..., ExperimentConfig]
Batches = list[list[list[int]]]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Batches]:
    """The ids of every training batch, a list for each arm that was trained (not for warm-up steps)."""
    seen: list[Batches] = []
    make = arm_module.make_trainer

    def watched(*arguments: Any) -> Trainer:
        trainer = make(*arguments)
        seen.append([])
        step = trainer.training_step

        def noted(model: Any, inputs: Any, *rest: Any) -> Any:
            seen[-1].append(inputs["input_ids"].tolist())
            return step(model, inputs, *rest)

        trainer.training_step = noted  # type: ignore[method-assign]
        return trainer

    monkeypatch.setattr(arm_module, "make_trainer", watched)
    return seen


def context_of(config: ExperimentConfig) -> Context:
    return make_context(config, plan_experiment(config), TrainerCallback())


def run_all(context: Context) -> tuple[dict[str, RunRecord], Calibration]:
    """Every arm with seed 1; the arms share their calibration, as they do in a seed."""
    calibration: Calibration | None = None
    records = {}
    for arm in context.plan.arms:
        records[arm.arm], calibration = run_arm(context, arm, 1, calibration)
    assert calibration is not None
    return records, calibration


def test_arms_of_a_seed_differ_in_the_mask_alone(experiment: MakeExperiment, batches: list[Batches]) -> None:
    context = context_of(experiment("lora.dropout=0.1"))
    records, _ = run_all(context)
    lora, fish, rand, rev, head = records.values()
    assert all(record.status == "ok" for record in records.values())
    assert fish.initial_state == rand.initial_state == rev.initial_state
    assert len(batches) == 5
    assert all(of_arm == batches[0] for of_arm in batches)
    assert len(batches[0]) == 3
    counts = {name: record.trainable_parameters for name, record in records.items()}
    assert counts == {arm.arm: arm.trainable_parameters for arm in context.plan.arms}
    # AdamW keeps two numbers an entry, and a step counter (fp32) a tensor.
    for record in records.values():
        assert record.optimizer_state_bytes is not None
        assert 0 <= record.optimizer_state_bytes - 8 * (record.trainable_parameters or 0) <= 4 * 26
    assert fish.fisher_seconds == rev.fisher_seconds != 0  # they share one scoring
    assert lora.fisher_seconds == rand.fisher_seconds == head.fisher_seconds == 0


def test_counts_tell_adapter_and_head_apart(experiment: MakeExperiment) -> None:
    records, _ = run_all(context_of(experiment("fish_tuning.methods_to_run=[lora, lora-fish, head]")))
    counts = {name: (record.kept_parameters, record.head_parameters) for name, record in records.items()}
    assert counts == {"lora": (2 * 3 * 2 * 32, 34), "lora-fish": (175, 34), "head": (0, 34)}
    assert {record.constant_value for record in records.values()} == {0.5}


def test_adapters_are_saved_with_their_masks_and_load_in_stock_peft(
    experiment: MakeExperiment, tmp_path: Path, bert_folder: Path
) -> None:
    config = experiment("fish_tuning.methods_to_run=[lora-fish]", "lora.init_lora_weights=true")
    record = run_all(context_of(config))[0]["lora-fish"]
    folder = tmp_path / "results" / "adapters" / "lora-fish-seed1"
    assert record.adapter_bytes == (folder / "adapter_model.safetensors").stat().st_size
    assert (record.adapter_digest, record.mask_digest) == adapter_digests(folder)
    mask = load_mask(folder / "fish_mask.safetensors")
    assert sum(int(selected.sum()) for selected in mask.values()) == record.trainable_parameters
    base = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=2)
    loaded = PeftModel.from_pretrained(base, folder)
    assert sum(p.numel() for n, p in loaded.named_parameters() if "lora_" in n) == 2 * 3 * 4 * 32


def test_the_head_alone_loads_in_stock_peft_as_base_and_head(
    experiment: MakeExperiment, tmp_path: Path, bert_folder: Path
) -> None:
    context = context_of(experiment("lora.init_lora_weights=pissa", "training.args_override.learning_rate=0.01"))
    arm = context.plan.arms[-1]
    start = context.starts("head", 1)
    run_arm(context, arm, 1)
    base = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=2)
    loaded = PeftModel.from_pretrained(base, tmp_path / "results" / "adapters" / "head-seed1").eval()
    before, after = start.state_dict(), loaded.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("modules_to_save" in name or "original_module" in name for name in changed), changed
    inputs = {"input_ids": torch.tensor([[2, 7, 9, 3]])}
    encoder, plain = loaded.base_model.model.bert, AutoModelForSequenceClassification.from_pretrained(bert_folder).bert
    with torch.no_grad():
        assert torch.equal(encoder(**inputs).last_hidden_state, plain.eval()(**inputs).last_hidden_state)


def test_warm_up_scores_elsewhere_but_trains_from_the_start(experiment: MakeExperiment) -> None:
    settings = ["fish_tuning.methods_to_run=[lora-fish]", "lora.init_lora_weights=true"]
    sums = []
    for steps in (0, 3):
        records, calibration = run_all(context_of(experiment(*settings, f"fish_tuning.warmup_steps={steps}")))
        a_score = sum(float(scores.sum()) for name, scores in calibration.scores.items() if "lora_A" in name)
        sums.append((records["lora-fish"].initial_state, a_score))
    (cold_start, cold), (warm_start, warm) = sums
    assert cold_start == warm_start
    assert cold == 0 < warm


def test_scores_of_another_start_are_refused(experiment: MakeExperiment) -> None:
    context = context_of(experiment("fish_tuning.methods_to_run=[lora-fish]"))
    with pytest.raises(Exception, match="another starting point"):
        run_arm(context, context.plan.arms[0], 1, Calibration({}, 0.0, "another"))


def test_an_error_leaves_the_earlier_adapter_whole(
    experiment: MakeExperiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(experiment("fish_tuning.methods_to_run=[lora-fish]"))
    folder = tmp_path / "results" / "adapters" / "lora-fish-seed1"
    run_arm(context, context.plan.arms[0], 1)
    before = adapter_digests(folder)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arm_module, "save_mask", full)
    with pytest.raises(OSError, match="No space"):
        run_arm(context, context.plan.arms[0], 1, learning_rate=0.5)
    assert adapter_digests(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_arm_under_bfloat16_is_trained_bare(experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate wraps the forward pass; a second wrapping must not come upon a first."""
    wrapped = []
    make = arm_module.make_trainer

    def watched(context: Context, model: Any, *rest: Any) -> Trainer:
        wrapped.append("forward" in vars(model))
        return make(context, model, *rest)

    monkeypatch.setattr(arm_module, "make_trainer", watched)
    context = context_of(experiment("fish_tuning.methods_to_run=[lora-fish]", "training.args_override.bf16=true"))
    record, _ = run_arm(context, context.plan.arms[0], 1)
    assert record.status == "ok"
    assert record.fisher_seconds
    assert wrapped == [False]


def test_entries_are_chosen_again(experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every so many steps but the last, only where scores choose, and as many as planned."""
    context = context_of(
        experiment("fish_tuning.reselect_every=1", "fish_tuning.methods_to_run=[lora-fish, lora-fish-rand]")
    )
    calls = []
    score = arm_module.score

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["warmup_steps"])
        return score(*args, **kwargs)

    monkeypatch.setattr(arm_module, "score", watched)
    records, _ = run_all(context)
    assert {record.status for record in records.values()} == {"ok"}
    assert calls == [0, 0]  # 48 examples in batches of 16: three steps
    assert len({record.kept_parameters for record in records.values()}) == 1


def test_the_last_choice_is_saved(experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    context = context_of(experiment("fish_tuning.reselect_every=1", "fish_tuning.methods_to_run=[lora-fish]"))
    chosen = []
    make = arm_module._mask_of

    def other_every_time(context: Context, arm: Any, seed: int, scores: Any) -> Any:
        drawn = {name: torch.rand(tensor.shape) for name, tensor in scores.items()}
        chosen.append(make(context, arm, seed, drawn))
        return chosen[-1]

    monkeypatch.setattr(arm_module, "_mask_of", other_every_time)
    run_arm(context, context.plan.arms[0], 1)
    saved = load_mask(tmp_path / "results" / "adapters" / "lora-fish-seed1" / "fish_mask.safetensors")
    assert len(chosen) == 3
    assert all(torch.equal(mask, chosen[-1][name]) for name, mask in saved.items())
    assert any(not torch.equal(mask, chosen[0][name]) for name, mask in saved.items())


def test_choosing_again_and_early_stopping_exclude_each_other(experiment: MakeExperiment) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot go with training\.early_stopping_patience"):
        experiment("fish_tuning.reselect_every=1", "training.early_stopping_patience=2")
