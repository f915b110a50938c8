"""Scoring that runs out of memory begins again in smaller batches, where the Trainer is to find its batch size."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import in_two_processes
from tiny import Rows, assert_same_tensors, assert_scores_close, bert, classification_batch, lora, rebatch
from transformers import Trainer, TrainingArguments

from fish_tuning import FisherError, calculate_fisher_information, fish_tune, get_mask
from fish_tuning.training.smaller_batches import in_batches_that_fit

BATCH = classification_batch((5, 9, 3, 7, 6, 8, 4, 5))


def with_room_for(rows: int) -> Any:
    """A model that runs out of memory where it is scored in larger batches."""
    model = lora(bert(), init_lora_weights=True)

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not module.training and len(kwargs["input_ids"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.base_model.model.register_forward_pre_hook(look, with_kwargs=True)
    return model


def trained(folder: Path, room: int, size: int = 8, find: bool = True) -> Trainer:
    args = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=size, auto_find_batch_size=find, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_strategy="no", use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(with_room_for(room), args, train_dataset=Rows(BATCH))
    return fish_tune(trainer, keep_ratio=0.3, num_samples=6, progress=False)


def test_it_begins_again_in_smaller_batches_and_trains_in_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = trained(tmp_path, room=2)
    assert [each for each in caplog.messages if "memory" in each] == [
        f"Scoring ran out of memory; it begins again in batches of {size}." for size in (4, 2)
    ]
    assert_same_tensors(get_mask(found.model), get_mask(trained(tmp_path, room=2, size=2).model))
    assert found.state.train_batch_size == 8


@pytest.mark.parametrize(("room", "find"), [(2, False), (0, True)])
def test_what_cannot_be_made_smaller_is_raised_as_it_came(room: int, find: bool, tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        trained(tmp_path, room, find=find)


def test_another_error_is_raised_at_once() -> None:
    calls = []

    def score(calibration: dict[str, Any]) -> None:
        calls.append(calibration)
        raise FisherError("'a' is in one memory with 'b'")

    trainer = SimpleNamespace(args=SimpleNamespace(auto_find_batch_size=True))
    with pytest.raises(FisherError, match="in one memory"):
        in_batches_that_fit(trainer, {"calibration_dataloader": rebatch(BATCH, 4)}, score)
    assert len(calls) == 1


def test_pairs_stay_together() -> None:
    sizes: list[list[int]] = []

    def score(calibration: dict[str, Any]) -> int:
        sizes.append([len(batch["labels"]) for batch in calibration["calibration_dataloader"]])
        if max(sizes[-1]) > 2:
            raise MemoryError
        return len(sizes)

    trainer = SimpleNamespace(args=SimpleNamespace(auto_find_batch_size=True))
    calibration = {"calibration_dataloader": rebatch(BATCH, 6), "rows_per_example": 2}
    assert in_batches_that_fit(trainer, calibration, score) == 2
    assert sizes == [[6, 2], [2, 2, 2, 2]]


def worker(rank: int, folder: Path) -> Any:
    model = with_room_for(2 if rank else 8)
    trainer = SimpleNamespace(args=SimpleNamespace(auto_find_batch_size=True))
    return in_batches_that_fit(
        trainer,
        {"calibration_dataloader": rebatch(BATCH, 4)},
        lambda calibration: calculate_fisher_information(model, **calibration, progress=False, warmup_steps=0),
    )


def test_all_processes_begin_again_where_one_ran_out(tmp_path: Path) -> None:
    expected = calculate_fisher_information(with_room_for(8), [BATCH], progress=False, warmup_steps=0)
    for scores in in_two_processes(worker, tmp_path):
        assert_scores_close(scores, expected, tolerance=1e-5)
