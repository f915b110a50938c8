"""A learning rate of its own for the head."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Rows, bert, classification_batch, lora, on_cpu, random_mask, tensors
from torch import Tensor
from transformers import Trainer, TrainingArguments, default_data_collator

from fish_tuning import FishMaskCallback, FishTuningTrainer, MaskError, create_mask_from_fisher, set_head_learning_rate
from fish_tuning.training.head_rate import split_off

DATA = Rows(classification_batch((5, 9, 3, 7, 6, 8, 4, 5)))


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.02,
        "weight_decay": 0.1, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "logging_strategy": "no", "use_cpu": True, "max_grad_norm": 0.0,
    }  # fmt: skip
    return TrainingArguments(**(defaults | settings))


def parts(folder: Path, **settings: Any) -> dict[str, Any]:
    return {"args": arguments(folder, **settings), "train_dataset": DATA, "data_collator": default_data_collator}


def trained(folder: Path, head_learning_rate: float | None, learning_rate: float = 0.02) -> dict[str, Tensor]:
    model = lora(bert())
    mask = random_mask(model, dense=["classifier"])
    made = parts(folder, learning_rate=learning_rate)
    FishTuningTrainer(model=model, mask=mask, head_learning_rate=head_learning_rate, **made).train()
    return tensors(model)


def test_each_part_moves_as_with_its_own_rate(tmp_path: Path) -> None:
    """AdamW's first step of an entry is its learning rate, whatever the other tensors' is."""
    start = on_cpu(tensors(lora(bert())))
    model = lora(bert())
    mask = random_mask(model, dense=["classifier"])
    made = parts(tmp_path, max_steps=1, weight_decay=0.0)
    FishTuningTrainer(model=model, mask=mask, head_learning_rate=0.003, **made).train()
    moved = {name: (tensor - start[name]).abs().max().item() for name, tensor in on_cpu(tensors(model)).items()}
    head = [move for name, move in moved.items() if "modules_to_save" in name and "weight" in name]
    pool = [move for name, move in moved.items() if "lora_B" in name and move]
    assert head == pytest.approx([0.003] * len(head), rel=1e-3)
    assert pool
    assert pool == pytest.approx([0.02] * len(pool), rel=1e-3)


def test_the_same_rate_changes_nothing(tmp_path: Path) -> None:
    without, given = trained(tmp_path, None), trained(tmp_path, 0.02)
    assert all(torch.equal(tensor, given[name]) for name, tensor in without.items())


def test_schedule_scales_both(tmp_path: Path) -> None:
    model = lora(bert())
    trainer = Trainer(model=model, **parts(tmp_path, lr_scheduler_type="linear"))
    set_head_learning_rate(trainer, 0.002)
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    rates = {round(group["lr"], 6) for group in trainer.optimizer.param_groups if group["params"]}
    assert rates == {0.02 * 3 / 4, 0.002 * 3 / 4}


def test_every_parameter_is_there_once(tmp_path: Path) -> None:
    model = lora(bert())
    trainer = Trainer(model=model, callbacks=[FishMaskCallback(random_mask(model))], **parts(tmp_path))
    set_head_learning_rate(trainer, 0.002)
    held = [id(p) for group in trainer.create_optimizer().param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_head_of_a_base_model_is_what_its_mask_leaves_dense(tmp_path: Path) -> None:
    model = bert()
    scores = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    mask = create_mask_from_fisher(scores, keep_ratio=0.1, names_to_exclude=["classifier"], zero_scores="ignore")
    trainer = FishTuningTrainer(model=model, mask=mask, head_learning_rate=0.002, **parts(tmp_path))
    groups = trainer.create_optimizer().param_groups
    head = {id(model.classifier.weight), id(model.classifier.bias)}
    assert {id(p) for group in groups if group["lr"] == 0.002 for p in group["params"]} == head


def test_groups_keep_their_other_settings() -> None:
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([{"params": [first, second], "weight_decay": 0.3}], lr=0.1, betas=(0.5, 0.6))
    split_off(optimizer, [second], 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    assert all(group["weight_decay"] == 0.3 and group["betas"] == (0.5, 0.6) for group in optimizer.param_groups)


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    headless = Trainer(model=lora(bert(), task_type="FEATURE_EXTRACTION"), **parts(tmp_path))
    with pytest.raises(MaskError, match="no head"):
        set_head_learning_rate(headless, 0.01)
    trainer = Trainer(model=lora(bert()), **parts(tmp_path))
    with pytest.raises(MaskError, match="above 0"):
        set_head_learning_rate(trainer, 0.0)
    trainer.create_optimizer()
    with pytest.raises(MaskError, match="has its optimizer already"):
        set_head_learning_rate(trainer, 0.01)


def test_nothing_outlives_the_trainer(tmp_path: Path) -> None:
    model = lora(bert())
    trainer = Trainer(model=model, **parts(tmp_path))
    set_head_learning_rate(trainer, 0.002)
    gone = weakref.ref(vars(trainer)["create_optimizer"])
    del trainer
    gc.collect()
    assert gone() is None
