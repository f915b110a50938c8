"""A mask that comes after FSDP2 has the model: it trains, saves and refuses as one that came before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import adamw, entries_of_state
from processes import in_two_processes, refusal
from tiny import assert_only_selected_moved, bert, classification_batch, lora, random_mask, rebatch, tensors
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers.models.bert.modeling_bert import BertLayer

from fish_tuning import (
    apply_mask,
    calculate_fisher_information,
    count_trainable_parameters,
    create_mask_from_fisher,
    get_mask,
    load_mask,
)
from fish_tuning.sparse.fsdp2 import groups_of

pytestmark = pytest.mark.slow

BATCH = classification_batch((5, 9, 3, 7, 9, 4, 8, 6))
LAYER = "base_model.model.bert.encoder.layer.0.attention.self.query"


def adapted() -> Any:
    return lora(bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), lora_dropout=0.0)


def base_weights() -> Any:
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.bert.embeddings.position_embeddings.requires_grad_(False)
    return model


def mask_of(model: nn.Module) -> dict[str, Tensor]:
    """With a tensor that keeps nothing, and the head dense."""
    mask = random_mask(model, 0.3, dense=["classifier"])
    first = next(name for name in mask if "classifier" not in name)
    mask[first] = torch.zeros_like(mask[first])
    return mask


def without_a_factor(model: nn.Module) -> dict[str, Tensor]:
    """With a group of FSDP that keeps nothing."""
    return mask_of(model) | {name: torch.zeros_like(m) for name, m in mask_of(model).items() if LAYER in name}


def sharded(model: Any, policy: Any = None, also: str | None = None, reshard_after_forward: bool = True) -> Any:
    options = {"mp_policy": policy or MixedPrecisionPolicy(), "reshard_after_forward": reshard_after_forward}
    if also is not None:
        for name in ("lora_A", "lora_B"):
            fully_shard(model.get_submodule(f"{also}.{name}.default"), **options)
    for module in list(model.modules()):
        if isinstance(module, BertLayer):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def passed(model: Any) -> Any:
    """After a pass, FSDP leaves the root's parameters gathered."""
    with torch.no_grad():
        model(**BATCH)
    return model


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
    "kept gathered": (adapted, mask_of, lambda model: sharded(model, reshard_after_forward=False)),
    "an empty group": (adapted, without_a_factor, lambda model: sharded(model, also=LAYER)),
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


def with_an_early_optimizer() -> str:
    model = sharded(adapted())
    optimizer = adamw(model)
    apply_mask(model, mask_of(adapted()))
    model(**BATCH).loss.backward()
    return refusal(optimizer.step)


def refusals(rank: int) -> dict[str, str]:
    def after(mask: Any, prepare: Callable[[Any], Any] = lambda model: model) -> str:
        model = prepare(sharded(adapted()))
        return refusal(lambda: apply_mask(model, mask))

    def accumulating(model: Any) -> Any:
        model.set_requires_gradient_sync(False)
        model(**BATCH).loss.backward()
        return model

    mask = mask_of(adapted())
    other = mask | {f"{LAYER}.lora_B.default.weight": torch.rand(16, 4) < 0.5 + 0.3 * rank}
    unknown = {"nothing": torch.ones(2, dtype=torch.bool)}
    twice = sharded(adapted())
    apply_mask(twice, mask)
    return {
        "different": after(other),
        "one process": after(unknown if rank == 1 else mask),
        "shape": after({f"{LAYER}.lora_B.default.weight": torch.zeros(3, dtype=torch.bool)}),
        "accumulating": after(mask, accumulating),
        "early optimizer": with_an_early_optimizer(),
        "twice": refusal(lambda: apply_mask(twice, mask)),
    }


def worker(rank: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    found: dict[str, Any] = {name: before_and_after(name) for name in CASES}
    return {**found, "scored": scored_then_masked(folder), "told": refusals(rank)}


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
    one, other = (result["scored"] for result in results)
    kept = sum(int(selected.sum()) for selected in one["mask"].values())
    assert one["held"] + other["held"] == kept
    assert one["entries"] + other["entries"] == 2 * kept
    start = adapted()
    assert_only_selected_moved(tensors(start), one["state"], one["mask"])
    stored = load_mask(folder / "adapter")
    assert all(torch.equal(stored[name], selected) for name, selected in one["mask"].items())
    apply_mask(start, stored)
    assert count_trainable_parameters(start) == kept


def test_refusals_reach_all_processes(results: list[dict[str, Any]]) -> None:
    for rank, told in enumerate(result["told"] for result in results):
        assert "different masks" in told["different"]
        assert ("Process 1 of 2 cannot apply the mask" in told["one process"]) == (rank == 0)
        assert "names 'nothing'" in told["one process"]
        assert "of shape (3,)" in told["shape"]
        assert "Apply the mask before or after the accumulation" in told["accumulating"]
        assert "has a mask already" in told["twice"]
        assert "AdamW was made before apply_mask" in told["early optimizer"]
