"""A model whose parts accelerate has placed is scored and trained where they lie, to the bit.

Its hooks are the same whatever the devices; several devices are not here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from tiny import Rows, assert_same_tensors, bert, classification_batch, lora, rebatch, tensors
from torch import nn
from transformers import TrainingArguments

from fish_tuning import FishTuningTrainer, calculate_scores, create_mask_from_fisher
from fish_tuning.scores.prepared import move

PARTS = ("bert.embeddings", "bert.encoder", "bert.pooler", "dropout", "classifier")


def trained(folder: Path, *, placed: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    base: Any = bert()
    if placed:
        base = dispatch_model(base, dict.fromkeys(PARTS, "cpu"), main_device="cpu", force_hooks=True)
        assert any(hasattr(module, "_hf_hook") for module in base.modules())
    model, batch = lora(base, init_lora_weights=True), classification_batch()
    scores = calculate_scores(model, rebatch(batch, 2), "gain", "cpu", progress=False)
    mask = create_mask_from_fisher(scores, keep_ratio=0.3, names_to_exclude=["modules_to_save"])
    args = TrainingArguments(
        str(folder), num_train_epochs=2, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    FishTuningTrainer(model=model, args=args, mask=mask, train_dataset=Rows(batch)).train()
    return scores, tensors(model)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the parts are placed on the CPU")
def test_a_model_in_parts_is_scored_and_trained_as_a_whole_one(tmp_path: Path) -> None:
    (scores, after), (other_scores, other_after) = (trained(tmp_path, placed=placed) for placed in (False, True))
    assert_same_tensors(scores, other_scores)
    assert_same_tensors(after, other_after)


@pytest.mark.parametrize("attribute", [{"hf_device_map": {"": "cpu"}}, {"is_loaded_in_8bit": True}])
def test_what_was_placed_when_it_was_loaded_is_not_moved(attribute: dict[str, Any]) -> None:
    whole, placed = nn.Linear(2, 2), nn.Linear(2, 2)
    vars(placed).update(attribute)
    for model in (whole, placed):
        move(model, "meta")
    assert whole.weight.is_meta
    assert not placed.weight.is_meta
