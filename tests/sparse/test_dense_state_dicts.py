"""Whole state dicts that torch's checkpoints bring into masked models, where FSDP2 has them and where nothing has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from engines import Fsdp2, adamw, fsdp_on_the_cpu
from processes import in_two_processes
from tiny import assert_same_tensors, bert, classification_batch, lora, random_mask, rebatch
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
                assert torch.equal(partial[lacks], own[lacks])
            else:  # of parts that two processes drew
                assert not torch.equal(partial[lacks], expected[lacks])


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
