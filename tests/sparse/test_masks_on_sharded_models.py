"""A mask that comes after FSDP2 has the model: it trains, saves and refuses as one that came before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import adamw, entries_of_state
from late_masks import (
    BATCH,
    QUERY,
    adapted,
    assert_masked_trained_and_saved,
    assert_refused,
    mask_of,
    passed,
    refusals,
    without_a_factor,
)
from processes import in_two_processes
from tiny import bert, rebatch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers.models.bert.modeling_bert import BertLayer

from fish_tuning import (
    apply_mask,
    calculate_fisher_information,
    create_mask_from_fisher,
    get_mask,
)
from fish_tuning.sparse.fsdp2 import groups_of

pytestmark = pytest.mark.slow


def base_weights() -> Any:
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.bert.embeddings.position_embeddings.requires_grad_(False)
    return model


def sharded(model: Any, policy: Any = None, also: str | None = None, reshard_after_forward: bool = True) -> Any:
    options = {"mp_policy": policy or MixedPrecisionPolicy(), "reshard_after_forward": reshard_after_forward}
    if also is not None:
        for name in ("lora_A", "lora_B"):
            fully_shard(model.get_submodule(f"{also}.{name}.default"), **options)
    for module in list(model.modules()):
        if isinstance(module, BertLayer):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def trained(model: Any) -> dict[str, Any]:
    optimizer = adamw(model.train())
    for half in rebatch(BATCH, 2)[dist.get_rank() :: 2] * 2:
        model(**half).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    options = StateDictOptions(full_state_dict=True, cpu_offload=False)
    return {"state": get_model_state_dict(model, options=options), "entries": entries_of_state(optimizer)}


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
# The model, its mask, and how FSDP has it.
CASES: dict[str, tuple[Callable[[], Any], Callable[[nn.Module], dict[str, Tensor]], Callable[[Any], Any]]] = {
    "lora": (adapted, mask_of, sharded),
    "base weights": (base_weights, mask_of, sharded),
    "bf16": (adapted, mask_of, lambda model: sharded(model, BF16)),
    "base weights in bf16": (base_weights, mask_of, lambda model: sharded(model, BF16)),
    "kept gathered": (adapted, mask_of, lambda model: sharded(model, reshard_after_forward=False)),
    "an empty group": (adapted, without_a_factor, lambda model: sharded(model, also=QUERY)),
}


def before_and_after(name: str) -> dict[str, Any]:
    make, mask, shard = CASES[name]
    found = {}
    for when in ("before", "after", "after a pass"):
        model = make()
        chosen = mask(model)
        if when == "before":
            apply_mask(model, chosen)
            model = shard(model)
        else:
            model = shard(model)
            apply_mask(passed(model) if when == "after a pass" else model, chosen)
        found[when] = trained(model)
        assert {name: m.all() for name, m in get_mask(model).items()} == {n: m.all() for n, m in chosen.items()}
    return found


def scored_then_masked(folder: Path) -> dict[str, Any]:
    """As somebody does it whose model fits on no device."""
    model = sharded(adapted())
    scores = calculate_fisher_information(model, rebatch(BATCH, 2), warmup_steps=0, progress=False)
    mask = create_mask_from_fisher(scores, keep_ratio=0.1)
    apply_mask(model, mask)
    held = sum(each.sharded_param.to_local().numel() for group in groups_of(model) for each in group.fsdp_params
               if each.sharded_param.requires_grad)  # fmt: skip
    found = {"mask": mask, "held": held, **trained(model)}
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "adapter", state_dict=found["state"])
    return found


def accumulating(model: Any) -> Any:
    model.set_requires_gradient_sync(False)
    model(**BATCH).loss.backward()
    return model


def worker(rank: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    found: dict[str, Any] = {name: before_and_after(name) for name in CASES}
    return {**found, "scored": scored_then_masked(folder), "told": refusals(sharded, accumulating, rank)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("masked")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return in_two_processes(worker, folder)


@pytest.mark.parametrize("name", CASES)
def test_it_trains_to_the_same_bits_as_a_mask_that_came_before(name: str, results: list[dict[str, Any]]) -> None:
    make, mask, _ = CASES[name]
    kept = sum(int(selected.sum()) for selected in mask(make()).values())
    for when in ("after", "after a pass"):
        for result in results:
            one, other = result[name]["before"], result[name][when]
            assert list(one["state"]) == list(other["state"])
            assert all(torch.equal(tensor, other["state"][key]) for key, tensor in one["state"].items()), when
        assert sum(result[name][when]["entries"] for result in results) == 2 * kept


def test_what_was_scored_sharded_is_masked_trained_and_saved(results: list[dict[str, Any]], folder: Path) -> None:
    assert_masked_trained_and_saved(*(result["scored"] for result in results), folder=folder / "adapter")


def test_refusals_reach_all_processes(results: list[dict[str, Any]]) -> None:
    for rank, told in enumerate(result["told"] for result in results):
        assert_refused(told, rank)
