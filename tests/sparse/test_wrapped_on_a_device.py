"""One process with the engines' wrappers, over NCCL where the tests compute on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import DEVICE
from tiny import Batch, assert_only_selected_moved, bert, classification_batch, lora, on_cpu, random_mask, tensors
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.bert.modeling_bert import BertLayer

from fish_tuning import apply_mask, synchronize_mask

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_process(tmp_path: Path) -> Iterator[None]:
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1, init_method=f"file://{tmp_path / 'store'}")
    yield
    dist.destroy_process_group()


def masked(place: torch.device) -> tuple[Any, dict[str, Tensor]]:
    model = lora(bert()).to(place)
    mask = {name: tensor.to(place) for name, tensor in random_mask(model, 0.5).items()}
    apply_mask(model, mask)
    return model.eval(), mask


def train(model: nn.Module, batch: Batch) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def fsdp1(model: nn.Module) -> nn.Module:
    policy = ModuleWrapPolicy({BertLayer})
    return FullyShardedDataParallel(model, use_orig_params=True, auto_wrap_policy=policy, device_id=DEVICE)


def fsdp2(model: Any) -> nn.Module:
    mesh = init_device_mesh(DEVICE.type, (1,))
    for block in model.base_model.model.bert.encoder.layer:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model  # type: ignore[no-any-return]


def ddp(model: nn.Module) -> nn.Module:
    synchronize_mask(model)
    return nn.parallel.DistributedDataParallel(model)


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "moved": lambda model: model.to(DEVICE),
    "DDP": lambda model: ddp(model.to(DEVICE)),
    "DataParallel": lambda model: nn.DataParallel(model.to(DEVICE)),
    "FSDP1": fsdp1,
    "FSDP2": fsdp2,
}


@pytest.mark.filterwarnings("ignore")  # FSDP1 tells of parameters that do not train, and of its one process
@pytest.mark.parametrize("place", [CPU, DEVICE] if DEVICE != CPU else [CPU], ids=str)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_it_trains_as_without(wrap: Callable[[Any], nn.Module], place: torch.device) -> None:
    batch = classification_batch()
    alone, _ = masked(DEVICE)
    train(alone, batch)
    model, mask = masked(place)
    before = tensors(model)
    train(wrap(model), batch)
    state = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}
    torch.testing.assert_close(on_cpu(state), on_cpu(alone.state_dict()), rtol=0, atol=1e-6)
    assert_only_selected_moved(before, state, mask)
