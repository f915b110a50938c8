"""Shares of memory and traffic, against numbers by hand and against what DDP sends."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import bert, classification_batch, lora, random_mask
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from fish_tuning import apply_mask
from fish_tuning.experiments.costs.devices import STRATEGIES, FrozenParts, Sizes, device_costs, traffic
from fish_tuning.experiments.costs.kernels import matmul_workspace

SIZES = Sizes(
    parameters=1000,
    replicated=100,
    buffers=60,
    largest_layer=80,
    rest=200,
    trained=40,
    gradients=40,
    optimizer=84,
    copies=20,
    step=0,
)


def peak(share: float) -> int:
    return 500 + round(40 * share)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_device_needs_all_and_sends_nothing(strategy: str) -> None:
    costs = device_costs(SIZES, strategy, 1, 500, peak)
    assert (costs.weights, costs.gradients, costs.gathered, costs.buckets, costs.traffic) == (1100, 40, 0, 0, 0)
    assert costs.peak == 1100 + 84 + 540


def test_each_device_keeps_a_workspace() -> None:
    for strategy in STRATEGIES:
        without = device_costs(SIZES, strategy, 4, 500, peak)
        given = device_costs(replace(SIZES, workspace=7000), strategy, 4, 500, peak)
        assert given == replace(without, peak=(without.peak or 0) + 7000)


@pytest.mark.parametrize(
    ("capability", "expected"), [(None, 2 * 2**25), ((8, 6), 2 * 8_519_680), ((9, 0), 2 * 2**25), ((12, 0), 2 * 2**25)]
)
def test_workspace_is_that_of_the_gpu_that_is_there_else_of_a_later_one(
    capability: tuple[int, int] | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert matmul_workspace() == expected


def test_ddp() -> None:
    costs = device_costs(SIZES, "ddp", 4, 500, peak)
    assert (costs.weights, costs.gradients, costs.optimizer, costs.buckets) == (1100, 40, 84, 40)
    assert costs.peak == 1100 + 84 + 40 + 540
    assert costs.traffic == 2 * 3 / 4 * 40 + 60


def test_fsdp() -> None:
    costs = device_costs(SIZES, "fsdp", 4, 500, peak)
    assert (costs.weights, costs.gradients, costs.optimizer) == (350, 10, 21)
    assert costs.gathered == 200 + 2 * 80
    assert costs.peak == 350 + 21 + 510 + 360
    assert costs.traffic == 3 / 4 * (2 * 1000 + 40)


def test_fsdp_shards_the_frozen_parts_of_masked_tensors_and_no_one_else_does() -> None:
    sizes = replace(SIZES, replicated=500, frozen_parts=FrozenParts(total=400, largest_layer=30, rest=40))
    costs = device_costs(sizes, "fsdp", 4, 500, peak)
    assert (costs.weights, costs.gathered) == (100 + 350, 240 + 2 * 110)
    assert costs.traffic == 3 / 4 * (2 * 1400 + 40)
    assert device_costs(sizes, "zero3", 4, 500, peak).weights == 500 + 250
    assert device_costs(sizes, "ddp", 4, 500, peak).weights == device_costs(sizes, "fsdp", 1, 500, peak).weights == 1500


def test_zero_2_shards_no_weights() -> None:
    costs = device_costs(SIZES, "zero2", 4, 500, peak)
    assert (costs.weights, costs.gradients, costs.optimizer, costs.gathered) == (1100, 10, 21 + 5, 0)
    assert costs.traffic == 3 / 4 * (40 + 40)


def test_zero_3_shards_all() -> None:
    costs = device_costs(SIZES, "zero3", 2, 500, peak)
    assert (costs.weights, costs.gradients, costs.optimizer, costs.gathered) == (600, 20, 42 + 10, 360)


def test_accumulated_gradients() -> None:
    sizes = replace(SIZES, accumulates=3)
    assert traffic(sizes, "ddp", 2) == 40 + 3 * 60  # gradients once, buffers every time
    assert traffic(sizes, "fsdp", 2) == 3 * 1000 + 20
    assert traffic(sizes, "zero3", 2) == 3 * 1000 + 60
    assert device_costs(sizes, "fsdp", 4, 500, peak).gradients == 40  # whole until the last batch


def test_an_untraced_model_has_no_peak() -> None:
    costs = device_costs(SIZES, "fsdp", 2, None, None)
    assert costs.peak is None
    assert costs.activations is None
    assert costs.traffic > 0


def test_the_step_may_be_the_peak() -> None:
    assert device_costs(replace(SIZES, step=9000), "ddp", 1, 500, peak).peak == 1100 + 84 + 40 + 9000


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=datetime.timedelta(seconds=60))
    yield
    dist.destroy_process_group()


def test_ddp_keeps_as_much_again_as_the_gradients(process_group: None) -> None:
    model = lora(bert())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    engines, kept = [], []
    for _ in range(4):  # torch keeps a few hundred bytes of its own beside some of them
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            engines.append(DistributedDataParallel(model))
        events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        kept.append(sum(event.nbytes() for event in events if event.name() == "[memory]"))
    assert min(kept) == trained, kept
    assert device_costs(replace(SIZES, gradients=trained), "ddp", 2, 500, peak).buckets == trained


def test_ddp_sends_the_gradients_of_the_trained_values(process_group: None) -> None:
    model = lora(bert())
    apply_mask(model, random_mask(model, 0.3, dense=["classifier"]))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    engine, sent = DistributedDataParallel(model), []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # torch takes no annotations that are texts
        sent.append(bucket.buffer().nbytes)
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    engine.register_comm_hook(None, hook)
    engine(**classification_batch()).loss.backward()
    sizes = replace(SIZES, gradients=trained, buffers=0)
    assert sum(sent) == trained
    assert traffic(sizes, "ddp", 2) == sum(sent)
