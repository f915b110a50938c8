"""What is FSDP1's own when a model is scored that it has flattened: it trains on as if nothing had been scored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import adamw
from processes import once_in_two_processes, refusal
from tiny import assert_scores_close, bert, causal_batch, classification_batch, llama, lora, rebatch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fish_tuning import calculate_fisher_information
from fish_tuning.starts.along_gradient import gradient_directions

BATCH = classification_batch((5, 9, 3, 7, 9, 4, 8, 6, 9, 5))
TEXTS = causal_batch((5, 9, 3, 7, 9, 4, 6, 8))
LAYERS = ModuleWrapPolicy({BertLayer, LlamaDecoderLayer})


def base() -> Any:
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def adapted() -> Any:
    """At PEFT's own start, which is scored after warm-up."""
    return lora(base(), init_lora_weights=True, lora_dropout=0.0)


def fsdp1(model: Any, **options: Any) -> Any:
    settings = {"use_orig_params": True, "auto_wrap_policy": LAYERS, "device_id": torch.device("cpu"), **options}
    return FullyShardedDataParallel(model, **settings)


def scored(model: Any, batches: Any = None, **options: Any) -> dict[str, Tensor]:
    batches = batches or rebatch(TEXTS if "Llama" in repr(model) else BATCH, 2)
    return calculate_fisher_information(model, batches, progress=False, **options)


def whole_base() -> Any:
    return base().requires_grad_(True)


def checkpointed() -> Any:
    model = adapted()
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, BertLayer))
    return model


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def in_a_part(model: Any) -> Any:
    """A model that is not FSDP1's, with layers that are."""
    layers = model.base_model.model.bert.encoder.layer
    for number, layer in enumerate(layers):
        layers[number] = fsdp1(layer, auto_wrap_policy=None)
    return model


# How FSDP1 has what is scored.
CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "flat parameters": (whole_base, lambda model: fsdp1(model, use_orig_params=False)),
    "base weights": (whole_base, fsdp1),
    "not sharded": (adapted, lambda model: fsdp1(model, sharding_strategy=ShardingStrategy.NO_SHARD)),
    "gradients sharded": (adapted, lambda model: fsdp1(model, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)),
    "layers alone": (adapted, in_a_part),
    "one unit": (adapted, lambda model: fsdp1(model, auto_wrap_policy=None)),
    "ignored": (adapted, lambda model: fsdp1(model, ignored_modules=[model.base_model.model.classifier])),
    "compiled": (adapted, lambda model: torch.compile(fsdp1(model), backend="eager")),
    "checkpointed": (checkpointed, fsdp1),
    "tied": (tied, fsdp1),
}


def trained(interrupted: bool, strategy: ShardingStrategy) -> dict[str, Any]:
    """A training of three steps, with scores before it, between a backward pass and its step, and between steps."""

    def maybe_score(model: Any) -> None:
        if interrupted:
            scored(model)

    model = fsdp1(adapted(), sharding_strategy=strategy).train()
    maybe_score(model)
    optimizer, losses = adamw(model), []
    for number, batch in enumerate(rebatch(BATCH, 2)[:3]):
        loss = model(**batch).loss
        loss.backward()
        if number == 1:
            maybe_score(model)
        optimizer.step()
        optimizer.zero_grad()
        maybe_score(model)
        losses.append(loss.detach())
    parts = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    state = {str(n): value for n, each in enumerate(optimizer.state.values()) for value in each.values()}
    return {"losses": torch.stack(losses), **parts, **state}


def gathers_while_scored(model: Any) -> int:
    """How often FSDP1 gathered while one process alone went through its batches."""
    calls: list[str] = []
    gather = dist.all_gather  # of tensors on a CPU

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append("gather")
        return gather(*args, **kwargs)

    dist.all_gather = counted
    try:
        scored(model, rebatch(BATCH, 1) * 3, split_between_processes=False)
    finally:
        dist.all_gather = gather
    return len(calls)


def worker(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: scored(wrap(make())) for name, (make, wrap) in CASES.items()}
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP):
        found[f"trained, {strategy.name}"] = [trained(interrupted, strategy) for interrupted in (False, True)]

    model = fsdp1(adapted())
    before = [(name, id(module)) for name, module in model.named_modules()]
    units = sum(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    found["gathers"] = gathers_while_scored(model), units
    broken = dict(BATCH, labels=BATCH["labels"] + 100)
    with FullyShardedDataParallel.summon_full_params(model):
        within = refusal(lambda: scored(model))
    found["told"] = {
        "broken": refusal(lambda: scored(model, [broken])),
        "within": within,
        "part": refusal(lambda: scored(model.module)),
        "start": refusal(lambda: gradient_directions(model, [BATCH], progress=False)),
    }
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    found["afterwards"] = scored(model)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return once_in_two_processes(worker, tmp_path_factory, "fsdp1")


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_one_process_with_the_whole_model(name: str, results: list[dict[str, Any]]) -> None:
    alone = scored(CASES[name][0]())
    for result in results:
        assert_scores_close(result[name], alone, tolerance=1e-5)
        assert list(result[name]) == list(alone)


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP"])
def test_a_training_that_is_interrupted_to_score_ends_in_the_same_bits(
    strategy: str, results: list[dict[str, Any]]
) -> None:
    for result in results:
        plain, interrupted = result[f"trained, {strategy}"]
        assert list(plain) == list(interrupted)
        assert all(torch.equal(plain[key], interrupted[key]) for key in plain)


def test_it_gathers_once_however_many_batches_there_are(results: list[dict[str, Any]]) -> None:
    for gathers, units in (result["gathers"] for result in results):
        assert 0 < gathers <= units


def test_what_cannot_be_scored_is_named(results: list[dict[str, Any]]) -> None:
    for result in results:
        told = result["told"]
        assert "label" in told["broken"]
        assert "within a pass or a summon_full_params" in told["within"]
        assert "lies in a flat tensor of FSDP1" in told["part"]
        assert "before it is wrapped" in told["start"]


def test_an_error_leaves_the_model_as_it_was(results: list[dict[str, Any]]) -> None:
    alone = scored(adapted())
    for result in results:
        assert_scores_close(result["afterwards"], alone, tolerance=1e-5)
