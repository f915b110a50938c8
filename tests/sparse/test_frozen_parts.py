"""The frozen part of a masked tensor under FSDP2: split, and to the same bits as where each device keeps all of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from engines import adamw
from processes import once_in_two_processes, refusal
from tiny import assert_only_selected_moved, assert_same_tensors, bert, classification_batch, lora, random_mask, rebatch
from tiny import tensors as tensors_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers.models.bert.modeling_bert import BertLayer

from fish_tuning import apply_mask
from fish_tuning.sparse import frozen_parts
from fish_tuning.sparse.masked_tensors import masked_tensors

BATCH = classification_batch((5, 9, 3, 7, 9, 4, 8, 6))
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
EMPTY = "bert.encoder.layer.0.attention.self.query.bias"  # of which the mask selects nothing


def base(seed: int = 0) -> Any:
    return bert(seed=seed, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def adapted() -> Any:
    return lora(base(), lora_dropout=0.0)


def mask_of(model: nn.Module) -> dict[str, Tensor]:
    """By half of the matrices an entry of ten; one tensor without any."""
    mask = random_mask(model, 0.1)
    return {name: torch.zeros_like(selected) if EMPTY in name else selected for name, selected in mask.items()}


def masked(model: Any) -> Any:
    apply_mask(model, mask_of(model))
    return model


def sharded(model: Any, **options: Any) -> Any:
    for module in [module for module in model.modules() if isinstance(module, BertLayer)]:
        fully_shard(module, **options)
    return fully_shard(model, **options)


def in_columns(parameter: nn.Parameter) -> Any:
    even = parameter.dim() > 1 and parameter.shape[1] % 2 == 0
    return Shard(1) if even else None


def compiled(model: Any) -> Any:
    for module in [module for module in model.modules() if isinstance(module, BertLayer)]:
        module.compile(backend="aot_eager")
    return sharded(model)


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable()
    return sharded(model)


# Ways of splitting; each is to give the same bits whether frozen parts are split or not.
WAYS: dict[str, Callable[[Any], Any]] = {
    "plain": sharded,
    "bf16": lambda model: sharded(model, mp_policy=BF16),
    "kept gathered": lambda model: sharded(model, reshard_after_forward=False),
    "in columns": lambda model: sharded(model, shard_placement_fn=in_columns),
    "copies of parts": lambda model: sharded(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("r", "s"))),
    "compiled": compiled,
    "checkpointed": checkpointed,
}


def whole(model: Any) -> dict[str, Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def trained(model: Any, halves: int = 4) -> Any:
    optimizer = adamw(model.train())
    for half in (rebatch(BATCH, 2)[dist.get_rank() :: 2] * 2)[:halves]:
        model(**half).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def held(model: Any) -> int:
    """Numbers of frozen tensors in this process's memory."""
    parts = [tensor.frozen for tensor in masked_tensors(model)]
    return sum((part.to_local() if hasattr(part, "to_local") else part).numel() for part in parts)


def split_or_not(way: str, make: Callable[[], Any]) -> list[dict[str, Any]]:
    """Everything larger than eight numbers is split, then nothing but what has no selected entry."""
    found = []
    for large in (8, 2**30):
        with mock.patch.object(frozen_parts, "_LARGE", large):
            model = WAYS[way](masked(make()))
            start = held(model)
            found.append(
                {"held": start, "state": whole(trained(model)), "names": dict(model.named_parameters()).keys()}
            )
            found[-1]["names"] = list(found[-1]["names"])
    return found


def from_the_meta_device(assign: bool) -> dict[str, Tensor]:
    """As those do it whose model fits on no device: its weights come once it is split."""
    full = tensors_of(masked(base()))
    model = masked(base(seed=1))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model = sharded(model.to("meta"))
    if assign:
        empty = model.state_dict()
        parts = {
            name: distribute_tensor(full[name], part.device_mesh, part.placements, src_data_rank=None)
            for name, part in empty.items()
        }
        model.load_state_dict(parts, assign=True)
    else:
        model.to_empty(device="cpu")
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, full if dist.get_rank() == 0 else {}, options=options)
    for name, buffer in buffers.items():
        path, _, local = name.rpartition(".")
        model.get_submodule(path)._buffers[local] = buffer
    return whole(trained(model))


def resumed(folder: Path) -> list[dict[str, Tensor]]:
    """A model that went on, and another one that is given its checkpoint and goes on."""
    first, second = sharded(masked(base())), sharded(masked(base(seed=1)))
    of_first = adamw(first)
    first(**BATCH).loss.backward()
    of_first.step()
    of_first.zero_grad()
    model_state, optimizer_state = get_state_dict(first, of_first)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "checkpoint")
    of_second = adamw(second)
    model_state, optimizer_state = get_state_dict(second, of_second)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "checkpoint")
    set_state_dict(second, of_second, model_state_dict=model_state, optim_state_dict=optimizer_state)
    for model, optimizer in ((first, of_first), (second, of_second)):
        model(**BATCH).loss.backward()
        optimizer.step()
    return [whole(first), whole(second)]


def written_into() -> str:
    """What is written into a gathered tensor would be lost."""
    model = sharded(masked(base()))
    dense = model.bert.encoder.layer[0].output.dense

    def write(*_: Any) -> None:
        with torch.no_grad():
            dense.weight.mul_(2)

    dense.register_forward_pre_hook(write)
    return refusal(lambda: model(**BATCH))


def worker(rank: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    found: dict[str, Any] = {way: split_or_not(way, base) for way in WAYS}
    found["adapted"] = split_or_not("bf16", adapted)
    with mock.patch.object(frozen_parts, "_LARGE", 8):
        found["meta"] = [from_the_meta_device(assign) for assign in (False, True)]
        found["resumed"] = resumed(folder)
        found["written"] = written_into()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return once_in_two_processes(worker, tmp_path_factory, "frozen_parts")


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("way", [*WAYS, "adapted"])
def test_split_parts_train_to_the_same_bits(way: str, results: list[dict[str, Any]]) -> None:
    for result in results:
        split, kept = result[way]
        assert_same_tensors(split["state"], kept["state"])
        if way not in ("bf16", "adapted"):
            assert_only_selected_moved(tensors_of(base()), split["state"], mask_of(base()))


def test_together_the_processes_hold_each_frozen_tensor_once(results: list[dict[str, Any]]) -> None:
    every = sum(tensor.numel() for tensor in base().parameters())
    split = [result["plain"][0]["held"] for result in results]
    assert every <= sum(split) <= 1.05 * every  # vectors of eight numbers and fewer are in both
    assert all(result["plain"][1]["held"] > 0.95 * every for result in results)
    assert all(result["copies of parts"][0]["held"] == every for result in results)


def test_no_one_else_finds_the_frozen_parts(results: list[dict[str, Any]]) -> None:
    for result in results:
        for found in result["plain"]:
            assert not [name for name in found["names"] if "frozen" in name]
            assert list(found["state"]) == list(tensors_of(base()))


@pytest.mark.parametrize("assign", [False, True])
def test_weights_may_come_when_the_model_is_split(assign: bool, results: list[dict[str, Any]]) -> None:
    for result in results:
        assert_same_tensors(result["meta"][assign], result["plain"][0]["state"])


def test_a_checkpoint_by_parts_brings_the_frozen_entries_too(results: list[dict[str, Any]]) -> None:
    for result in results:
        went_on, resumed = result["resumed"]
        assert_same_tensors(went_on, resumed)


def test_what_writes_into_a_gathered_tensor_is_refused(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert "was written into while FSDP" in result["written"]
