"""A mask that comes between two engines of DeepSpeed: the second trains as one that never had another model."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import ENGINES, NEEDS_DEEPSPEED, adamw, deepspeed_config, deepspeed_on_the_cpu, entries_of_state
from peft import PeftModel
from processes import in_two_processes, refusal
from tiny import assert_only_selected_moved, assert_same_tensors, bert, classification_batch, lora, random_mask, rebatch
from tiny import tensors as tensors_of
from torch import Tensor

from fish_tuning import (
    apply_mask,
    calculate_fisher_information,
    create_mask_from_fisher,
    get_mask,
    load_mask,
    synchronize_mask,
)

pytest.importorskip("deepspeed", reason=NEEDS_DEEPSPEED)
pytestmark = pytest.mark.slow

BATCH = classification_batch((5, 9, 3, 9, 6, 8, 9, 9))
STAGES = ["ZeRO-2", "ZeRO-3"]


def base() -> Any:
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def adapted(seed: int = 0) -> Any:
    return lora(base(), seed=seed, lora_dropout=0.0)


def base_weights() -> Any:
    """But for those that have no gradient but rounding, which Adam makes large."""
    model = base().requires_grad_(True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("key.bias" not in name and "position_embeddings" not in name)
    return model


def mask_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """With a tensor that keeps nothing, and the head dense."""
    mask = random_mask(model, 0.2, dense=["classifier"])
    first = next(name for name in mask if "classifier" not in name)
    return mask | {first: torch.zeros_like(mask[first])}


MODELS: dict[str, Callable[[], Any]] = {"lora": adapted, "base weights": base_weights}


def stepped(engine: Any, steps: int = 2) -> Any:
    for _ in range(steps):
        engine.step(rebatch(BATCH, 4)[dist.get_rank()])
    return engine


def masked(model: Any, mask: dict[str, Tensor]) -> Any:
    apply_mask(model, mask)
    synchronize_mask(model)
    return model


def left_by(engine: Any) -> Any:
    """The model, when the engine is no more."""
    engine.model.destroy()
    return engine.inner


def split(model: Any) -> Any:
    """As it is where no process ever has all of it."""
    with deepspeed_on_the_cpu().zero.Init(module=model, config_dict_or_path=deepspeed_config(3)):
        return model


def before_and_after(stage: str, make: Callable[[], Any]) -> dict[str, Any]:
    engine, mask = ENGINES[stage], mask_of(make())
    before = stepped(engine(masked(make(), mask)))
    after = stepped(engine(masked(left_by(engine(make())), mask)))
    later = stepped(engine(masked(left_by(stepped(engine(make()), 1)), mask)))
    found = {"split": stepped(engine(masked(split(make()), mask))).whole_state_dict()} if stage == "ZeRO-3" else {}
    return {
        **found,
        "before": before.whole_state_dict(),
        "after": after.whole_state_dict(),
        "after a step": later.whole_state_dict(),
        "entries": [entries_of_state(each.optimizer) for each in (before, after, later)],
        "mask": get_mask(after.inner),
    }


def scored_then_masked(stage: str, folder: Path) -> dict[str, Any]:
    engine = ENGINES[stage]
    model = adapted()
    first = engine(model)
    scores = calculate_fisher_information(first.model, rebatch(BATCH, 2), warmup_steps=0, progress=False)
    mask = create_mask_from_fisher(scores, keep_ratio=0.1)
    told = refusal(lambda: apply_mask(model, mask))
    left_by(first)
    old = weakref.ref(first.model)
    del first
    second = stepped(engine(masked(model, mask)))
    gc.collect()
    state = second.whole_state_dict()
    if dist.get_rank() == 0:
        model.save_pretrained(str(folder / stage), state_dict=state)
    return {"told": told, "mask": mask, "first engine is gone": old() is None}


def worker(rank: int, folder: Path) -> dict[str, Any]:
    return {
        stage: {name: before_and_after(stage, make) for name, make in MODELS.items()}
        | {"scored": scored_then_masked(stage, folder)}
        for stage in STAGES
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("between")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return in_two_processes(worker, folder)


def in_one_process(make: Callable[[], Any], dense_steps: int, steps: int) -> dict[str, Tensor]:
    model = make()

    def train(steps: int) -> None:
        optimizer = adamw(model)
        for _ in range(steps):
            for half in rebatch(BATCH, 4):
                (model(**half).loss / 2).backward()
            optimizer.step()
            optimizer.zero_grad()

    mask = mask_of(model)
    train(dense_steps)
    apply_mask(model, mask)
    train(steps)
    return tensors_of(model)


def selected(state: dict[str, Tensor], mask: dict[str, Tensor]) -> dict[str, Tensor]:
    """What trains, of whole tensors or, as ZeRO-3 gives them, of their selected entries."""
    return {
        name: (state[name][chosen] if state[name].shape == chosen.shape else state[name]).flatten()
        for name, chosen in mask.items()
        if chosen.any()
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stage", STAGES)
def test_it_trains_as_a_mask_that_came_before(stage: str, name: str, results: list[dict[str, Any]]) -> None:
    one = results[0][stage][name]  # ZeRO-3 gives the whole to the first process
    for when in {"after", "split"} & one.keys():
        assert_same_tensors(one[when], one["before"])
    mask = mask_of(MODELS[name]())
    expected = selected(in_one_process(MODELS[name], dense_steps=1, steps=2), mask)
    torch.testing.assert_close(selected(one["after a step"], mask), expected, rtol=0, atol=1e-5)
    for result in results:
        assert len(set(result[stage][name]["entries"])) == 1
        assert_same_tensors(result[stage][name]["mask"], mask)


@pytest.mark.parametrize("stage", STAGES)
def test_what_an_engine_scored_another_trains_masked_and_saves(
    stage: str, results: list[dict[str, Any]], folder: Path
) -> None:
    for result in results:
        told = result[stage]["scored"]
        assert f"DeepSpeed {stage}" in told["told"].replace("ZeRO-1 or ", "")
        assert "engine.destroy()" in told["told"]
        assert told["first engine is gone"]
    mask = results[0][stage]["scored"]["mask"]
    stock = tensors_of(PeftModel.from_pretrained(base(), folder / stage))
    assert_only_selected_moved(tensors_of(adapted()), stock, mask)
    assert_same_tensors(load_mask(folder / stage), mask)
