"""The mask's figures on their way to the callbacks that report."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import Recorder
from tiny import Rows, bert, classification_batch, lora, random_mask
from torch import Tensor
from transformers import Trainer, TrainingArguments

from fish_tuning import FishMaskCallback, FishTuningTrainer, apply_mask, count_trainable_parameters, report_figures
from fish_tuning.training.reporting import mask_figures

DATA = Rows(classification_batch((5, 9, 3, 7)))


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": "recorder",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "use_cpu": True,
    }
    return TrainingArguments(**(defaults | settings))


def masked_lora() -> tuple[Any, dict[str, Tensor]]:
    model = lora(bert())
    return model, random_mask(model, dense=["classifier"])


def figures_of(mask: dict[str, Tensor]) -> dict[str, float]:
    pool = [selected for name, selected in mask.items() if "classifier" not in name]
    return {
        "trainable_parameters": sum(int(selected.sum()) for selected in mask.values()),
        "keep_ratio": sum(int(selected.sum()) for selected in pool) / sum(selected.numel() for selected in pool),
    }


def test_the_trainer_reports_before_its_first_step(tmp_path: Path, recorders: list[Recorder]) -> None:
    model, mask = masked_lora()
    trainer = FishTuningTrainer(
        model=model, args=arguments(tmp_path), mask=mask, train_dataset=DATA, figures={"fisher_seconds": 1.5}
    )
    trainer.train()
    expected = {**figures_of(mask), "fisher_seconds": 1.5}
    assert recorders[0].first == expected
    assert expected.items() <= trainer.state.log_history[0].items()
    assert ["loss" in logs for logs in recorders[0].logs] == [False, True, True, False]


def test_any_trainer_reports_what_its_callback_applied(tmp_path: Path, recorders: list[Recorder]) -> None:
    model, mask = masked_lora()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=DATA, callbacks=[FishMaskCallback(mask)])
    report_figures(trainer)
    trainer.train()
    assert recorders[0].first == figures_of(mask)


def test_sft_reports(tmp_path: Path, recorders: list[Recorder]) -> None:
    trl = pytest.importorskip("trl", reason="needs trl: pip install 'fish-tuning[trl]'")
    from test_sft import settings, texts, tokenizer
    from tiny import llama

    model = lora(llama())
    args = settings(tmp_path)
    args.report_to = ["recorder"]
    trainer = trl.SFTTrainer(
        model, args, train_dataset=texts(), processing_class=tokenizer(),
        callbacks=[FishMaskCallback(random_mask(model))],
    )  # fmt: skip
    report_figures(trainer, {"fisher_seconds": 2.0})
    trainer.train()
    assert recorders[0].first == {**mask_figures(model), "fisher_seconds": 2.0}


def test_without_a_mask_the_count_alone_is_reported(tmp_path: Path, recorders: list[Recorder]) -> None:
    model = lora(bert())
    trainer = Trainer(model, arguments(tmp_path), train_dataset=DATA)
    report_figures(trainer)
    trainer.train()
    assert recorders[0].first == {"trainable_parameters": count_trainable_parameters(model)}


def test_figures_that_are_given_win_and_the_last_call_counts(tmp_path: Path, recorders: list[Recorder]) -> None:
    model, mask = masked_lora()
    trainer = FishTuningTrainer(model=model, args=arguments(tmp_path), mask=mask, train_dataset=DATA)
    report_figures(trainer, {"keep_ratio": 0.25})
    trainer.train()
    assert recorders[0].first == {**figures_of(mask), "keep_ratio": 0.25}
    assert sum("keep_ratio" in logs for logs in recorders[0].logs) == 1


def test_a_resumed_run_reports_again_where_it_goes_on(tmp_path: Path, recorders: list[Recorder]) -> None:
    for resume in (False, True):
        model, mask = masked_lora()
        args = arguments(tmp_path, max_steps=4 if resume else 2, save_strategy="steps", save_steps=2)
        trainer = FishTuningTrainer(model=model, args=args, mask=mask, train_dataset=DATA)
        trainer.train(resume_from_checkpoint=resume)
    assert recorders[1].first == figures_of(mask)
    assert recorders[1].events[1][1] == 2


def test_whole_tensors_that_are_kept_or_dropped_belong_to_the_pool() -> None:
    model = lora(bert())
    pool = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
    kept = {name: size for name, size in pool.items() if "lora_B" in name}
    parameters = dict(model.named_parameters())
    apply_mask(model, {name: torch.full(parameters[name].shape, name in kept) for name in pool})
    assert mask_figures(model)["keep_ratio"] == sum(kept.values()) / sum(pool.values())


def test_a_trainer_that_is_gone_leaves_its_memory(tmp_path: Path, recorders: list[Recorder]) -> None:
    model, mask = masked_lora()
    trainer = FishTuningTrainer(model=model, args=arguments(tmp_path), mask=mask, train_dataset=DATA)
    gone = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        assert gone() is None
    finally:
        gc.enable()
