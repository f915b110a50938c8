"""Masked models in Trainers under accelerate's engines, in two processes: trained, saved, resumed as in one process."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from engines import NEEDS_DEEPSPEED, deepspeed_config, deepspeed_on_the_cpu, entries_of_state, fsdp_on_the_cpu
from peft import PeftModel
from processes import in_two_processes
from tiny import (
    Rows,
    assert_only_selected_moved,
    assert_same_tensors,
    bert,
    classification_batch,
    lora,
    random_mask,
    rebatch,
    tensors,
)
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fish_tuning import (
    FishMaskCallback,
    FishTuningTrainer,
    MaskError,
    calculate_scores,
    create_mask_from_fisher,
    fish_tune,
    get_mask,
    last_checkpoint,
    load_mask,
)

DATA = Rows(classification_batch((5, 9, 3, 9, 6, 8, 9, 9)))
STEPS = 4
BY_SHARDS = "FSDP2, checkpoints by shards"


def base() -> Any:
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def model_of(seed: int = 0) -> PeftModel:
    return lora(base(), seed=seed, lora_dropout=0.0)


def mask_of(model: nn.Module) -> dict[str, Tensor]:
    return random_mask(model, 0.2, dense=["classifier"])


def settings(engine: str) -> dict[str, Any]:
    if engine in ("FSDP2", BY_SHARDS):
        kind = {"state_dict_type": "SHARDED_STATE_DICT"} if engine == BY_SHARDS else {}
        return {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]} | kind}
    if engine == "FSDP1":  # which asks an accelerator for what a process loads for the others
        own = {"version": 1, "sync_module_states": False, "cpu_ram_efficient_loading": False}
        return {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"], **own}}
    if engine.startswith("ZeRO"):
        return {"deepspeed": deepspeed_config(int(engine[-1]))}
    return {}


def arguments_in(folder: Path, engine: str, processes: int = 2, **others: Any) -> TrainingArguments:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1,
        "per_device_train_batch_size": 8 // processes, "learning_rate": 0.02, "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "report_to": [], "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "ddp_backend": "gloo" if processes > 1 else None,
    }  # fmt: skip
    return TrainingArguments(**(defaults | settings(engine) | others))


def trainer_in(folder: Path, engine: str, model: PeftModel, processes: int = 2, **others: Any) -> Trainer:
    more = {name: others.pop(name) for name in ("reselect_every", "choose") if name in others}
    by_callback = others.pop("by_callback", engine in ("ZeRO-3", BY_SHARDS))
    args = arguments_in(folder, engine, processes, **others)
    if by_callback:  # as SFTTrainer has it
        return Trainer(
            model=model, args=args, train_dataset=DATA, eval_dataset=DATA, callbacks=[FishMaskCallback(mask_of(model))]
        )
    return FishTuningTrainer(model=model, args=args, train_dataset=DATA, eval_dataset=DATA, mask=mask_of(model), **more)


def engine_worker(rank: int, folder: Path, engines: list[str]) -> dict[str, Any]:
    if "FSDP2" in engines:
        fsdp_on_the_cpu()
    else:
        deepspeed_on_the_cpu()
    return {engine: trained_and_resumed(rank, folder / engine, engine) for engine in engines}


def trained_and_resumed(rank: int, folder: Path, engine: str) -> dict[str, Any]:
    refusals = [refusal(partial(trainer_in, folder / "refused", engine, model_of()), wrong) for wrong in WRONG[engine]]
    trainer = trainer_in(folder / "out", engine, model_of())
    trainer.train()
    save_whole(trainer, folder / "adapter")
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder / "out" / f"checkpoint-{STEPS}")
    dist.barrier()
    # Drawn apart: what does not train has to come from the checkpoint as well.
    resumed = trainer_in(folder / "out", engine, model_of(seed=1))
    resumed.train(resume_from_checkpoint=last_checkpoint(folder / "out"))
    save_whole(resumed, folder / "resumed")
    # Of two evaluations the first is called the best: its loss is the larger.
    best = {"metric_for_best_model": "eval_loss", "greater_is_better": True, "eval_strategy": "steps", "eval_steps": 2}
    again = trainer_in(folder / "again", engine, model_of(), load_best_model_at_end=True, **best)
    again.train()
    save_whole(again, folder / "best")
    return {"entries of state": entries_of_state(trainer.optimizer), "refusals": refusals}


def save_whole(trainer: Trainer, folder: Path) -> None:
    """As PEFT's documentation has it of trainers whose checkpoints are by shards."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))


WRONG: dict[str, list[dict[str, Any]]] = {
    "FSDP2": [{"reselect_every": 1, "choose": mask_of}],
    BY_SHARDS: [],
    "ZeRO-2": [{"torch_compile": True}],
    "ZeRO-3": [{"deepspeed": deepspeed_config(3, stage3_gather_16bit_weights_on_model_save=False)}],
}
REFUSED = {
    "FSDP2": ["reselect_every=1: FSDP2"],
    BY_SHARDS: [],
    "ZeRO-2": ["torch_compile=True: a compiled model"],
    "ZeRO-3": ["without stage3_gather_16bit_weights_on_model_save"],
}


def refusal(make: Any, wrong: dict[str, Any]) -> str:
    try:
        make(**wrong).train()
    except (MaskError, ValueError) as error:
        return str(error)
    return "accepted"


@pytest.fixture(scope="module", params=["FSDP2", "DeepSpeed"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    if request.param == "DeepSpeed":
        pytest.importorskip("deepspeed", reason=NEEDS_DEEPSPEED)
    engines = ["FSDP2", BY_SHARDS] if request.param == "FSDP2" else ["ZeRO-2", "ZeRO-3"]
    folder = tmp_path_factory.mktemp("engines")
    return folder, in_two_processes(engine_worker, folder, engines)


def in_one_process(folder: Path, steps: int = STEPS) -> dict[str, Tensor]:
    model = model_of()
    trainer_in(folder, "none", model, processes=1, save_strategy="no", max_steps=steps).train()
    return tensors(model)


@pytest.mark.slow
def test_what_a_trainer_trains_saves_and_resumes_is_that_of_one_process(
    results: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    folder, ranks = results
    alone, halfway, mask = in_one_process(tmp_path), in_one_process(tmp_path, steps=2), mask_of(model_of())
    assert not all(torch.equal(tensor, alone[name]) for name, tensor in halfway.items())
    k = sum(int(selected.sum()) for selected in mask.values())
    for engine in ranks[0]:
        written = [] if engine == BY_SHARDS else [f"out/checkpoint-{STEPS}"]
        for name in ("adapter", "resumed", *written):
            stock = tensors(PeftModel.from_pretrained(base(), folder / engine / name))
            torch.testing.assert_close(stock, alone, rtol=0, atol=1e-6)
            assert_only_selected_moved(tensors(model_of()), stock, mask)
            assert_same_tensors(load_mask(folder / engine / name / "fish_mask.safetensors"), mask)
        best = tensors(PeftModel.from_pretrained(base(), folder / engine / "best"))
        torch.testing.assert_close(best, halfway, rtol=0, atol=1e-6)
        held = sum(rank[engine]["entries of state"] for rank in ranks)
        assert 2 * k <= held <= 2 * (k + len(mask))  # ZeRO fills up to a multiple of the processes


@pytest.mark.slow
def test_what_an_engine_cannot_do_is_refused_before_it_trains(results: tuple[Path, list[Any]]) -> None:
    for rank in results[1]:
        for engine, told in rank.items():
            assert len(told["refusals"]) == len(REFUSED[engine])
            for text, part in zip(told["refusals"], REFUSED[engine], strict=True):
                assert part in text


# A base model that is never whole in a process


def never_whole(rank: int, folder: Path) -> bool:
    """The arguments come before the model, so ZeRO-3 splits it while it is loaded."""
    deepspeed_on_the_cpu()
    args = arguments_in(folder / "out", "ZeRO-3")
    loaded = type(base()).from_pretrained(folder / "base")
    never = all(parameter.numel() == 0 for parameter in loaded.parameters())
    trainer = Trainer(lora(loaded, lora_dropout=0.0), args, train_dataset=DATA)
    fish_tune(trainer, keep_ratio=0.1).save_model(str(folder / "adapter"))
    return never


@pytest.mark.slow
def test_one_call_scores_masks_and_trains_what_no_process_holds(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason=NEEDS_DEEPSPEED)
    base().save_pretrained(tmp_path / "base")
    assert in_two_processes(never_whole, tmp_path) == [True, True]
    alone = Trainer(model_of(), arguments_in(tmp_path, "none", 1, save_strategy="no"), train_dataset=DATA)
    mask = get_mask(fish_tune(alone, keep_ratio=0.1).model)
    assert_same_tensors(load_mask(tmp_path / "adapter"), mask)
    stock = tensors(PeftModel.from_pretrained(base(), tmp_path / "adapter"))
    torch.testing.assert_close(stock, tensors(alone.model), rtol=0, atol=1e-6)
    assert_only_selected_moved(tensors(model_of()), stock, mask)


# FSDP1, which trains, and saves nothing


def fsdp1_worker(rank: int, folder: Path) -> dict[str, Any]:
    fsdp_on_the_cpu()
    refused = refusal(partial(trainer_in, folder / "refused", "FSDP1", model_of()), {"save_steps": 1})
    trainer = trainer_in(folder / "out", "FSDP1", model_of(), save_strategy="no")
    trainer.train()
    state = trainer.model_wrapped.state_dict()
    saved = "accepted"
    try:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder / f"alone{rank}", state_dict=state)
    except MaskError as error:
        saved = str(error)
    return {"refused": refused, "state": state, "entries": entries_of_state(trainer.optimizer), "saved": saved}


@pytest.mark.slow
def test_fsdp1_trains_as_one_process_and_is_refused_what_it_cannot_save(tmp_path: Path) -> None:
    ranks = in_two_processes(fsdp1_worker, tmp_path)
    alone, k = in_one_process(tmp_path / "alone"), sum(int(m.sum()) for m in mask_of(model_of()).values())
    torch.testing.assert_close(dict(ranks[0]["state"]), alone, rtol=0, atol=1e-6)
    assert sum(rank["entries"] for rank in ranks) == 2 * k
    for rank in ranks:
        assert "save_strategy='steps': under FSDP1" in rank["refused"]
        assert "names keep save_pretrained from" in rank["saved"]


# Choosing again under DDP


def by_scores(model: nn.Module) -> dict[str, Tensor]:
    batches = rebatch(DATA.batch, 2)
    scores = calculate_scores(model, batches, warmup_steps=0)
    k = sum(int(selected.sum()) for selected in mask_of(model_of()).values())
    return create_mask_from_fisher(scores, num_trainable=k, names_to_exclude=["classifier"])


def by_rank(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: selected if selected.all() else selected.flatten().roll(dist.get_rank()).view_as(selected)
        for name, selected in mask_of(model).items()
    }


def failing_on_one(model: nn.Module) -> dict[str, Tensor]:
    if dist.get_rank() == 1:
        raise ValueError("no data here")
    return mask_of(model)


def reselecting(rank: int, folder: Path) -> dict[str, Any]:
    model = model_of()
    trainer: Any = trainer_in(folder / "ddp", "none", model, save_strategy="no", reselect_every=2, choose=by_scores)
    trainer.train()
    told = {}
    for choose in (by_rank, failing_on_one):
        make = partial(trainer_in, folder / "refused", "none", model_of(), save_strategy="no")
        told[choose.__name__] = refusal(make, {"reselect_every": 1, "choose": choose})
    return {"trained": tensors(model), "mask": trainer.mask, "told": told}


@pytest.mark.slow
def test_processes_choose_again_together(tmp_path: Path) -> None:
    ranks = in_two_processes(reselecting, tmp_path)
    assert_same_tensors(ranks[0]["mask"], ranks[1]["mask"])
    assert_same_tensors(ranks[0]["trained"], ranks[1]["trained"])
    alone = model_of()
    trainer: Any = trainer_in(
        tmp_path, "none", alone, processes=1, save_strategy="no", reselect_every=2, choose=by_scores
    )
    trainer.train()
    assert_same_tensors(trainer.mask, ranks[0]["mask"])
    first = mask_of(model_of())
    assert any(not torch.equal(selected.cpu(), first[name].cpu()) for name, selected in trainer.mask.items())
    torch.testing.assert_close(ranks[0]["trained"], tensors(alone), rtol=0, atol=1e-6)
    for told in (rank["told"] for rank in ranks):
        assert "different masks" in told["by_rank"]
    assert "Process 1 of 2 failed: ValueError: no data here" in ranks[0]["told"]["failing_on_one"]
