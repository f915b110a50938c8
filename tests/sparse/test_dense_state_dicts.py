"""Whole state dicts that torch's checkpoints bring into masked models, where FSDP2 has them and where nothing has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Fsdp2
from processes import in_two_processes
from tiny import assert_same_tensors, bert, lora, random_mask
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
