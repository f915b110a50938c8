"""Masked models in the hands of FSDP and DeepSpeed, in two processes over gloo: as in one process, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import ENGINES, NEEDS_DEEPSPEED, Fsdp1, adamw, entries_of_state
from peft import PeftModel
from processes import in_two_processes, refusal
from tiny import (
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

from fish_tuning import (
    add_delta,
    apply_mask,
    get_mask,
    load_mask,
    remove_mask,
    replace_mask,
    save_delta,
    synchronize_mask,
)

BATCH = classification_batch((5, 9, 3, 9, 6, 8, 9, 9))
STEPS = 4


def base() -> Any:
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def model_of(seed: int = 0) -> PeftModel:
    return lora(base(), seed=seed, lora_dropout=0.0)


def mask_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return random_mask(model, 0.2, dense=["classifier"])


def save_adapter(engine: Any, folder: Path, same_start: bool = True) -> None:
    state = engine.whole_state_dict()
    if dist.get_rank() > 0:
        return
    if not same_start:
        changed = refusal(lambda: save_delta(engine.inner, folder.with_suffix(".safetensors"), state_dict=state))
        assert "Frozen entries have changed since apply_mask" in changed
    save_delta(engine.inner, folder.with_suffix(".safetensors"), state_dict=state, check_frozen=same_start)
    lacks = {name: tensor for name, tensor in state.items() if "lora_B" not in name}
    assert "state_dict has no" in refusal(lambda: save_delta(engine.inner, folder, state_dict=lacks))
    if type(engine) is Fsdp1:
        assert "names keep save_pretrained from" in refusal(
            lambda: engine.inner.save_pretrained(folder, state_dict=state)
        )
        model = model_of(seed=1)
        apply_mask(model, mask_of(model))
        model.load_state_dict(state)
        model.save_pretrained(str(folder))
    else:
        engine.inner.save_pretrained(str(folder), state_dict=state)


def worker(rank: int, folder: Path, names: list[str]) -> dict[str, Any]:
    return {name: in_the_hands_of(ENGINES[name], rank, folder / name) for name in names}


def in_the_hands_of(engine: Any, rank: int, folder: Path) -> dict[str, Any]:
    late = engine(model_of())
    apply_late = refusal(lambda: apply_mask(late.inner, mask_of(model_of())))

    model = model_of()
    apply_mask(model, mask_of(model))
    synchronize_mask(model)
    trained = engine(model)
    for step in range(STEPS):
        trained.step(rebatch(BATCH, 4)[rank])
        if step == 1:
            trained.save(folder / "checkpoint")
    save_adapter(trained, folder / "adapter")

    other = model_of(seed=1)  # drawn apart: what does not train has to come from the checkpoint as well
    apply_mask(other, mask_of(other))
    resumed = engine(other)
    resumed.load(folder / "checkpoint")
    for _ in range(STEPS - 2):
        if engine.resumes:
            resumed.step(rebatch(BATCH, 4)[rank])
    save_adapter(resumed, folder / "resumed", same_start=False)
    return {
        "late": apply_late,
        "entries of state": entries_of_state(trained.optimizer),
        "mask": get_mask(trained.model if engine.__name__ == "Fsdp1" else model),
        "replaced": refusal(lambda: replace_mask(model, mask_of(model_of()), trained.optimizer)),
        "saved alone": refusal(lambda: model.save_pretrained(str(folder / f"alone{rank}"))),
        "delta": refusal(lambda: save_delta(model, folder / f"delta{rank}.safetensors")),
        "unmasked": refusal(lambda: remove_mask(model)),
    }


@pytest.fixture(scope="module", params=["FSDP", "DeepSpeed"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    if request.param == "DeepSpeed":
        pytest.importorskip("deepspeed", reason=NEEDS_DEEPSPEED)
    names = ["FSDP2", "FSDP1"] if request.param == "FSDP" else ["ZeRO-2", "ZeRO-3"]
    folder = tmp_path_factory.mktemp("engines")
    for name in names:
        (folder / name).mkdir()
    return folder, in_two_processes(worker, folder, names)


def in_one_process(steps: int) -> dict[str, Tensor]:
    model = model_of()
    apply_mask(model, mask_of(model))
    optimizer = adamw(model)
    for _ in range(steps):
        for half in rebatch(BATCH, 4):
            (model(**half).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return tensors(model)


@pytest.mark.slow
def test_what_is_trained_saved_and_resumed_is_that_of_one_process(results: tuple[Path, list[Any]]) -> None:
    folder, ranks = results
    mask = mask_of(model_of())
    for engine in ranks[0]:
        for name in ("adapter", "resumed"):
            steps = STEPS if name == "adapter" or ENGINES[engine].resumes else 2
            stock = tensors(PeftModel.from_pretrained(base(), folder / engine / name))
            torch.testing.assert_close(stock, in_one_process(steps), rtol=0, atol=1e-6)
            assert_only_selected_moved(tensors(model_of()), stock, mask)
            assert_same_tensors(load_mask(folder / engine / name / "fish_mask.safetensors"), mask)
            added = model_of()
            add_delta(added, folder / engine / f"{name}.safetensors", check_base=name == "adapter")
            assert_same_tensors(tensors(added), stock)


@pytest.mark.slow
def test_the_optimizers_of_all_processes_hold_k_numbers(results: tuple[Path, list[Any]]) -> None:
    k = sum(int(selected.sum()) for selected in mask_of(model_of()).values())
    for engine in results[1][0]:
        held = sum(rank[engine]["entries of state"] for rank in results[1])
        # AdamW keeps two. ZeRO fills each parameter up to a multiple of the processes.
        assert 2 * k <= held <= 2 * (k + len(mask_of(model_of())))


@pytest.mark.slow
def test_the_mask_is_told_whole_wherever_the_model_is(results: tuple[Path, list[Any]]) -> None:
    for rank in results[1]:
        for told in rank.values():
            assert_same_tensors(told["mask"], mask_of(model_of()))


@pytest.mark.slow
def test_a_mask_that_comes_too_late_is_refused_by_name(results: tuple[Path, list[Any]]) -> None:
    """While an engine of DeepSpeed has the model, and inside FSDP1's wrapper."""
    for rank in results[1]:
        for engine, told in rank.items():
            if engine == "FSDP2":
                assert told["late"] == "accepted"
                continue
            assert engine in told["late"]
            assert ("outermost wrapper" if engine == "FSDP1" else "engine.destroy()") in told["late"]


@pytest.mark.slow
def test_what_needs_the_whole_model_is_refused_where_it_is_split(results: tuple[Path, list[Any]]) -> None:
    for rank in results[1]:
        for engine, told in rank.items():
            assert "needs one process or DDP" in told["replaced"]
            split = engine != "ZeRO-2"
            assert (engine in told["saved alone"]) == split
            assert (engine in told["delta"]) == split
            assert ("cannot take it off" in told["unmasked"]) == split
