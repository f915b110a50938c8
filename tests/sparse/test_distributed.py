"""Masked training in two processes over gloo: the same weights as in one, and traffic of k numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import DEVICE
from peft import PeftModel
from processes import once_in_two_processes
from tiny import (
    Rows,
    assert_only_selected_moved,
    assert_same_tensors,
    bert,
    classification_batch,
    lora,
    random_mask,
    rebatch,
    tensors,
)
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from fish_tuning import FishMaskCallback, MaskError, apply_mask, get_mask, synchronize_mask
from fish_tuning.sparse.masked_tensors import masked_tensors

BATCH = classification_batch((5, 9, 3, 9, 6, 8, 9, 9))
STEPS = 4
ROUNDING = 1e-6 if DEVICE.type == "cpu" else 1e-4  # the other processes compute on the CPU


def without_dropout() -> PeftModel:
    return lora(bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), lora_dropout=0.0)


def masked_model() -> Any:
    model = without_dropout()
    apply_mask(model, random_mask(model, 0.2, dense=["classifier"]))
    return model


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=0.02, weight_decay=0.1, fused=True)


def in_one_process() -> dict[str, Tensor]:
    model = masked_model()
    optimizer = optimizer_of(model)
    for _ in range(STEPS):
        for half in rebatch(BATCH, 4):
            (model(**half).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return tensors(model)


def trainer_arguments(folder: Path, processes: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=8 // processes, learning_rate=0.02,
        weight_decay=0.1, report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no", use_cpu=True,
        lr_scheduler_type="constant", ddp_backend="gloo" if processes > 1 else None, max_grad_norm=0.0,
    )  # fmt: skip


def train_by_trainer(folder: Path, processes: int) -> dict[str, Tensor]:
    model = without_dropout()
    callback = FishMaskCallback(random_mask(model, 0.2, dense=["classifier"]))
    Trainer(
        model=model, args=trainer_arguments(folder, processes), train_dataset=Rows(BATCH), callbacks=[callback]
    ).train()
    return tensors(model)


def synchronised_after_drawing(rank: int) -> dict[str, Tensor]:
    """Each process draws an adapter of its own, as an unseeded script does; DDP then makes them one."""
    model = lora(bert(), seed=rank)
    apply_mask(model, random_mask(model, 0.2, dense=["classifier"]))
    synchronize_mask(model)
    DistributedDataParallel(model)
    return tensors(model)


def refusal_of_different_masks(rank: int) -> str:
    model = lora(bert())
    apply_mask(model, random_mask(model, 0.2, seed=rank, dense=["classifier"]))
    try:
        synchronize_mask(model)
    except MaskError as error:
        return str(error)
    return "accepted"


def worker(rank: int, folder: Path) -> dict[str, Any]:
    model = masked_model()
    wrapped = DistributedDataParallel(model)
    sent: list[int] = []

    # DDP compares the annotations with types, which strings are not.
    def counted(state, bucket):  # type: ignore[no-untyped-def]
        sent.append(bucket.buffer().numel())
        work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, counted)
    synchronised = {buffer.data_ptr() for buffer in wrapped.modules_buffers}
    frozen = {tensor.frozen.data_ptr() for tensor in masked_tensors(model)}
    optimizer = optimizer_of(model)
    for _ in range(STEPS):
        wrapped(**rebatch(BATCH, 4)[rank]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        "loop": tensors(model),
        "sent a step": sum(sent) / STEPS,
        "frozen synchronised": len(synchronised & frozen),
        "frozen": len(frozen),
        "trainer": train_by_trainer(folder, processes=2),
        "drawn apart": synchronised_after_drawing(rank),
        "different masks": refusal_of_different_masks(rank),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return once_in_two_processes(worker, tmp_path_factory, "distributed")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["loop", "trainer"])
def test_both_processes_hold_the_weights_of_one(how: str, results: list[dict[str, Any]], tmp_path: Path) -> None:
    assert_same_tensors(results[0][how], results[1][how])
    single = in_one_process() if how == "loop" else train_by_trainer(tmp_path, processes=1)
    for name, tensor in single.items():
        torch.testing.assert_close(results[0][how][name], tensor.cpu(), rtol=0, atol=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["loop", "trainer"])
def test_only_selected_entries_move(how: str, results: list[dict[str, Any]]) -> None:
    before = tensors(without_dropout())
    assert_only_selected_moved(before, results[0][how], get_mask(masked_model()))


@pytest.mark.slow
def test_traffic_is_k_numbers_a_step(results: list[dict[str, Any]]) -> None:
    k = sum(int(selected.sum()) for selected in get_mask(masked_model()).values())
    for result in results:
        assert result["sent a step"] == k
        assert result["frozen"] > 0
        assert result["frozen synchronised"] == 0


@pytest.mark.slow
def test_adapters_that_were_drawn_apart_become_rank_0s(results: list[dict[str, Any]]) -> None:
    assert_same_tensors(results[0]["drawn apart"], results[1]["drawn apart"])
    assert_same_tensors(results[0]["drawn apart"], tensors(lora(bert(), seed=0)))


@pytest.mark.slow
def test_different_masks_are_refused_on_every_rank(results: list[dict[str, Any]]) -> None:
    assert all("different masks" in result["different masks"] for result in results)
