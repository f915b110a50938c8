"""Whole state dicts: that torch's checkpoints bring into masked models, and that masked models give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from engines import Fsdp2, adamw, fsdp_on_the_cpu
from processes import in_two_processes
from safetensors.torch import load_file, save_file
from tiny import assert_same_tensors, bert, classification_batch, lora, random_mask, rebatch, tensors
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from fish_tuning import apply_mask
from fish_tuning.sparse.masked_tensors import masked_tensors

WAYS = [(engine, from_one) for engine in ("FSDP2", "none") for from_one in (True, False)]


def model_of(seed: int) -> Any:
    return lora(bert(), seed=seed)


def mask_of(model: nn.Module) -> dict[str, Tensor]:
    """With a whole tensor, one without any entry, and others in between."""
    mask = random_mask(model, 0.2, dense=["classifier"])
    none, every = [name for name in mask if "lora_" in name][:2]
    return mask | {none: torch.zeros_like(mask[none]), every: torch.ones_like(mask[every])}


def saved() -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model_of(0).state_dict().items()}


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


def loaded(rank: int, engine: str, from_one: bool, lacks: str | None) -> dict[str, Any]:
    model = model_of(1 + rank)  # drawn apart: what does not train has to come as well
    apply_mask(model, mask_of(model))
    if engine == "FSDP2":
        Fsdp2(model)
    state = saved() if lacks is None else without(saved(), lacks)
    set_model_state_dict(
        model,
        state if rank == 0 or not from_one else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_one, strict=lacks is None),
    )
    return dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))


def worker(rank: int, folder: Path, lacks: str) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    return [(way, loaded(rank, *way, lacks=None), loaded(rank, *way, lacks=lacks)) for way in WAYS]


@pytest.mark.slow
def test_they_are_loaded_whole_on_every_process(tmp_path: Path) -> None:
    model = model_of(0)
    apply_mask(model, mask_of(model))
    *_, last = masked_tensors(model)
    lacks, expected = last.name, saved()
    for rank, ways in enumerate(in_two_processes(worker, tmp_path, lacks)):
        own = model_of(1 + rank).state_dict()
        for way, state, partial in ways:
            assert_same_tensors(state, expected)
            assert_same_tensors(without(partial, lacks), without(expected, lacks))
            if way[0] == "none":
                assert torch.equal(partial[lacks].cpu(), own[lacks].cpu())
            else:  # of parts that two processes drew
                assert not torch.equal(partial[lacks].cpu(), expected[lacks].cpu())


def resumed(rank: int, folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a third step leaves, and what it leaves of another model that accelerate has loaded the second one into."""
    fsdp_on_the_cpu()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type=kind, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"], cpu_ram_efficient_loading=False,
    )  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    batch = rebatch(classification_batch((5, 9, 3, 9)), 2)[rank]

    def prepared(seed: int) -> tuple[Any, Any]:
        model = lora(bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), seed=seed, lora_dropout=0.0)
        apply_mask(model, mask_of(model))
        return tuple(accelerator.prepare(model, adamw(model)))

    def step(model: Any, optimizer: Any) -> dict[str, Any]:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        return dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))

    trained = prepared(0)
    for _ in range(2):
        step(*trained)
    accelerator.save_state(str(folder / "state"))
    expected = step(*trained)
    accelerator.free_memory()
    other = prepared(1)
    accelerator.load_state(str(folder / "state"))
    return expected, step(*other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_accelerate_saves_and_loads_them(kind: str, tmp_path: Path) -> None:
    for expected, found in in_two_processes(resumed, tmp_path, kind):
        assert_same_tensors(found, expected)


def ema_by_copy(average: nn.Module, model: nn.Module) -> None:
    """timm's."""
    with torch.no_grad():
        for ours, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            ours.copy_(0.5 * ours + 0.5 * theirs)


def ema_in_place(average: nn.Module, model: nn.Module) -> None:
    """ultralytics'."""
    new = model.state_dict()
    with torch.no_grad():
        for name, tensor in average.state_dict().items():
            tensor *= 0.5
            tensor += 0.5 * new[name].detach()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("update", [ema_by_copy, ema_in_place])
def test_who_writes_into_a_state_dict_writes_into_the_model(update: Callable[..., None], inference: bool) -> None:
    models = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 300)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    mask = random_mask(models[1], 0.5)
    apply_mask(models[1], mask)
    averages = [copy.deepcopy(model) for model in models]
    optimizers = [torch.optim.SGD(average.parameters(), lr=1.0) for average in averages]
    for number in range(2):
        with torch.no_grad():
            for parameter in models[1].parameters():
                parameter.fill_(3.0 + number)
        models[0].load_state_dict(models[1].state_dict())
        for model, average in zip(models, averages, strict=True):
            with torch.inference_mode(inference):
                update(average, model)
        rows = torch.ones(1, 4)
        assert torch.equal(averages[0](rows), averages[1](rows))
        values = dict(averages[1].named_parameters())
        for name, tensor in averages[0].state_dict().items():
            assert torch.equal(values[name].flatten(), tensor[mask[name]])
        for average, optimizer in zip(averages, optimizers, strict=True):
            average(rows).square().sum().backward()
            for name, parameter in average.named_parameters():
                if average is averages[0]:
                    parameter.grad *= mask[name]
            optimizer.step()
            optimizer.zero_grad()
    assert_same_tensors(tensors(averages[0]), tensors(averages[1]))


def test_a_kept_state_dict_follows_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    apply_mask(model, random_mask(model, 0.5))
    kept = model.state_dict()
    model(torch.ones(1, 4)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert_same_tensors(kept, tensors(model))
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # what reads give is made anew
    model(torch.ones(1, 4))
    with torch.no_grad():
        kept["0.weight"].fill_(7.0)
    assert set(model[0].weight.flatten().tolist()) == {7.0}
    assert set(next(model.parameters()).flatten().tolist()) == {7.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_files_of_a_state_dict_hold_each_tensor_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """Small tensors share memory, which torch.save would write whole, and safetensors refuses."""
    model = nn.Sequential(*(nn.Linear(32, 32, dtype=dtype) for _ in range(8)))
    apply_mask(model, random_mask(model, 0.5))
    state = model.state_dict()
    for tensor in state.values():
        storage = tensor.untyped_storage()
        assert storage.nbytes() == tensor.numel() * tensor.element_size()
        assert type(tensor) is Tensor
    torch.save({"one": state["0.weight"]}, tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 2 * state["0.weight"].nbytes
    if not dtype.is_complex:
        save_file(state, tmp_path / "all.safetensors")
        assert_same_tensors(load_file(tmp_path / "all.safetensors"), dict(sorted(state.items())))
        Accelerator(cpu=True).save_model(model, tmp_path)
        assert_same_tensors(load_file(tmp_path / "model.safetensors"), dict(sorted(state.items())))


def test_a_state_dict_on_meta_has_shapes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    apply_mask(model, random_mask(model, 0.5))
    state = model.to("meta").state_dict()
    assert [tuple(tensor.shape) for tensor in state.values()] == [(4, 4), (4,)] * 2
    assert all(tensor.is_meta for tensor in state.values())


def test_a_tensor_without_entries_is_missed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    apply_mask(model, random_mask(model, 0.5) | {"0.weight": torch.zeros(4, 4, dtype=torch.bool)})
    state = model.state_dict()
    model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.weight"'):
        model.load_state_dict(without(state, "0.weight"))
    assert model.load_state_dict(without(state, "0.weight"), strict=False).missing_keys == ["0.weight"]
