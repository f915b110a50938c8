"""What is DeepSpeed ZeRO-3's own when a model is scored that it has split: it trains on as if nothing had been."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from engines import NEEDS_DEEPSPEED, adamw, deepspeed_config, deepspeed_on_the_cpu
from processes import in_two_processes
from tiny import assert_scores_close, bert, causal_batch, classification_batch, llama, lora, rebatch
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fish_tuning import FisherError, apply_mask, calculate_fisher_information, create_mask_from_fisher
from fish_tuning.scores.zero3 import Gatherer

pytestmark = pytest.mark.slow

BATCH = classification_batch((5, 9, 3, 7, 9, 4, 8, 6, 9, 5))
TEXTS = causal_batch((5, 9, 3, 7, 9, 4, 6, 8))
QUIET: dict[str, Any] = {"progress": False}
LAYERS = 4  # one of which is well below the whole


def base() -> Any:
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layers=LAYERS)


def adapted() -> Any:
    """At PEFT's own start, which is scored after warm-up."""
    return lora(base(), init_lora_weights=True, lora_dropout=0.0)


def engine_of(model: Any, **zero: Any) -> Any:
    settings = {"stage3_param_persistence_threshold": 20, **zero}  # some biases above it, some below
    config = deepspeed_config(3, **settings)
    engine, *_ = deepspeed_on_the_cpu().initialize(model=model, optimizer=adamw(model), config=config)
    return engine


def scored(model: Any, batches: Any = None, **options: Any) -> dict[str, Tensor]:
    return calculate_fisher_information(model, batches or rebatch(BATCH, 2), **QUIET, **options)


def state_of(engine: Any) -> dict[str, Any]:
    """All that ZeRO-3 keeps of a model and its training."""
    coordinator = engine.optimizer.parameter_offload.param_coordinator
    place = "_PartitionedParameterCoordinator__"
    names = {id(each): name for name, each in engine.module.named_parameters()}
    names |= {id(module): name for name, module in engine.module.named_modules()}
    return {
        "parts": {name: each.ds_tensor.clone() for name, each in engine.module.named_parameters()},
        "states": {
            name: (each.ds_status.name, each.requires_grad, each.ds_persist, len(each.ds_active_sub_modules))
            for name, each in engine.module.named_parameters()
        },
        "gradients": [name for name, each in engine.module.named_parameters() if each.grad is not None],
        "masters": [each.detach().clone() for each in engine.optimizer.fp32_partitioned_groups_flat],
        "optimizer": [
            {key: torch.as_tensor(value).clone() for key, value in each.items()}
            for each in engine.optimizer.optimizer.state.values()
        ],
        "trace": (
            getattr(coordinator, f"{place}trace_mode").name,
            [names[id(module)] for module in getattr(coordinator, f"{place}submodule_order")],
            [names[id(each.param)] for each in getattr(coordinator, f"{place}param_order")],
            getattr(coordinator, f"{place}step_id"),
        ),
        "hooks": {
            name: (
                len(module._forward_pre_hooks),
                len(module._forward_hooks),
                module.training,
                getattr(module, "applied_pre_backward_ref_cnt", None),
                getattr(module, "ds_grads_remaining", None),
                list(module._external_params),
                module._parameters._in_forward,
            )
            for name, module in engine.module.named_modules()
        },
        "own": sorted(vars(engine.optimizer.parameter_offload)),
    }


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key in ("states", "gradients", "trace", "hooks", "own"):
        assert one[key] == other[key], (key, one[key], other[key])
    assert all(torch.equal(part, other["parts"][name]) for name, part in one["parts"].items())
    assert all(torch.equal(*pair) for pair in zip(one["masters"], other["masters"], strict=True))
    for mine, theirs in zip(one["optimizer"], other["optimizer"], strict=True):
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


def trained(rank: int, score: Callable[[Any, str], object]) -> tuple[list[float], dict[str, Any]]:
    """The losses and the end of a training that is interrupted to score: new, midway, after a forward pass alone."""
    engine = engine_of(adapted())
    losses = []

    def step() -> None:
        engine.train()
        loss = engine(**rebatch(BATCH, 5)[rank]).loss
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()

    score(engine, "new")
    step()
    score(engine, "once trained")
    step()
    step()
    score(engine, "with a trace")
    step()
    with torch.no_grad():
        engine.eval()
        engine(**rebatch(BATCH, 5)[rank])  # leaves what it has fetched ahead
    score(engine, "after an evaluation")
    step()
    step()
    return losses, state_of(engine)


def training_goes_on(rank: int) -> dict[str, Any]:
    scores = {}

    def interrupted(engine: Any, when: str) -> None:
        before = state_of(engine)
        scores[when] = scored(engine)
        if when == "after an evaluation":  # what was under way has arrived, as at the next forward pass
            assert all(torch.equal(part, before["parts"][name]) for name, part in state_of(engine)["parts"].items())
        else:
            assert_same_state(state_of(engine), before)
        with pytest.raises(FisherError, match="label"):
            scored(engine, [{**BATCH, "labels": BATCH["labels"] + 100}], warmup_steps=2)
        with broken(engine.module), pytest.raises(ArithmeticError):
            scored(engine)

    losses, end = trained(rank, interrupted)
    plain, plain_end = trained(rank, lambda engine, when: None)
    assert losses == plain
    assert_same_state(end, plain_end)
    assert not torch.equal(next(iter(scores["new"].values())), next(iter(scores["with a trace"].values())))
    return scores


@contextlib.contextmanager
def broken(model: nn.Module) -> Iterator[None]:
    """Within the second layer's forward pass, in both processes."""

    def fail(*_: Any) -> None:
        raise ArithmeticError

    layer = [module for module in model.modules() if isinstance(module, BertLayer)][1]
    handle = layer.register_forward_pre_hook(fail)
    yield
    handle.remove()


def worker(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["trained"] = training_goes_on(rank)
    return found


if __name__ == "__main__":
    import tempfile
    in_two_processes(worker, Path(tempfile.mkdtemp()))
    print("OK")
