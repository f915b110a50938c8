"""A mask that comes after FSDP1 has the model: it trains, saves and refuses as one that came before."""

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
    refused,
    without_a_factor,
)
from processes import in_two_processes, refusal
from tiny import assert_same_tensors, bert, rebatch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy
from transformers.models.bert.modeling_bert import BertLayer

from fish_tuning import (
    apply_mask,
    calculate_fisher_information,
    create_mask_from_fisher,
    get_mask,
    synchronize_mask,
)

pytestmark = pytest.mark.slow

BF16 = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def base_weights() -> Any:
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).requires_grad_(True)


def checkpointed() -> Any:
    model = adapted()
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, BertLayer))
    return model


def fsdp1(model: Any, **options: Any) -> Any:
    settings = {
        "use_orig_params": True,
        "auto_wrap_policy": ModuleWrapPolicy({BertLayer}),
        "device_id": torch.device("cpu"),
    }
    return FullyShardedDataParallel(model, **{**settings, **options})


def factors_too(model: Any) -> Any:
    factors = {model.get_submodule(f"{QUERY}.{name}.default") for name in ("lora_A", "lora_B")}
    wrapped = CustomPolicy(lambda module: module in factors or isinstance(module, BertLayer))
    return fsdp1(model, auto_wrap_policy=wrapped)


def in_a_part(model: Any) -> Any:
    """A model that is not FSDP1's, with layers that are."""
    layers = model.base_model.model.bert.encoder.layer
    for number, layer in enumerate(layers):
        layers[number] = fsdp1(layer, auto_wrap_policy=None)
    return model


def stepped(model: Any) -> Any:
    """A step of training; its gradients are left there."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model(**rebatch(BATCH, 4)[dist.get_rank()]).loss.backward()
    optimizer.step()
    return model


def trained(model: Any) -> dict[str, Any]:
    optimizer = adamw(model.train())
    optimizer.zero_grad()
    for half in rebatch(BATCH, 2)[dist.get_rank() :: 2] * 2:
        model(**half).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"state": whole_state(model), "entries": entries_of_state(optimizer)}


def whole_state(model: Any) -> dict[str, Tensor]:
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {name.replace("_fsdp_wrapped_module.", ""): t.clone() for name, t in model.state_dict().items()}


Mask = Callable[[nn.Module], dict[str, Tensor]]
# The model, its mask, and how FSDP1 has it.
CASES: dict[str, tuple[Callable[[], Any], Mask, Callable[[Any], Any]]] = {
    "lora": (adapted, mask_of, fsdp1),
    "base weights": (base_weights, mask_of, fsdp1),
    "bf16": (adapted, mask_of, lambda model: fsdp1(model, mixed_precision=BF16)),
    "base weights in bf16": (base_weights, mask_of, lambda model: fsdp1(model, mixed_precision=BF16)),
    "not sharded": (adapted, mask_of, lambda model: fsdp1(model, sharding_strategy=ShardingStrategy.NO_SHARD)),
    "gradients sharded": (
        adapted,
        mask_of,
        lambda model: fsdp1(model, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP),
    ),
    "one unit": (adapted, mask_of, lambda model: fsdp1(model, auto_wrap_policy=None)),
    "layers alone": (adapted, mask_of, in_a_part),
    "ignored": (adapted, mask_of, lambda model: fsdp1(model, ignored_modules=[model.base_model.model.classifier])),
    "checkpointed": (checkpointed, mask_of, fsdp1),
    "an empty wrapper": (adapted, without_a_factor, factors_too),
}


def before_and_after(name: str) -> dict[str, Any]:
    make, mask, wrap = CASES[name]
    found = {}
    for when in ("before", "after", "after a pass", "after a step"):
        model = make()
        chosen = mask(model)
        if when == "before":
            apply_mask(model, chosen)
            synchronize_mask(model)
            model = wrap(model)
        else:
            prepare = {"after": lambda it: it, "after a pass": passed, "after a step": stepped}[when]
            model = prepare(wrap(model))
            apply_mask(model, chosen)
            synchronize_mask(model)
        found[when] = trained(model)
        assert {name: m.all() for name, m in get_mask(model).items()} == {n: m.all() for n, m in chosen.items()}
    return found


def scored_then_masked(folder: Path) -> dict[str, Any]:
    model = fsdp1(adapted())
    scores = calculate_fisher_information(model, rebatch(BATCH, 2), warmup_steps=0, progress=False)
    mask = create_mask_from_fisher(scores, keep_ratio=0.1)
    apply_mask(model, mask)
    held = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = {"mask": mask, "held": held, **trained(model)}
    saved = model.state_dict()
    if dist.get_rank() == 0:
        other = adapted(seed=1)
        apply_mask(other, mask)
        other.load_state_dict(saved)
        other.save_pretrained(folder / "adapter")
    return found


def accumulating(model: Any) -> Any:
    with model.no_sync():
        model(**BATCH).loss.backward()
    return model


def refusals_of_its_own() -> dict[str, str]:
    mask, within = mask_of(adapted()), fsdp1(adapted())
    with FullyShardedDataParallel.summon_full_params(within):
        told_within = refusal(lambda: apply_mask(within, mask))
    uniform = FullyShardedDataParallel(base_weights(), device_id=torch.device("cpu"))
    part = passed(fsdp1(adapted())).base_model.model.bert.encoder
    inner = {name.split("encoder.")[-1]: selected for name, selected in mask.items() if "encoder" in name}
    return {
        "within": told_within,
        "without names": refusal(lambda: apply_mask(uniform, mask_of(base_weights()))),
        "inside": refused(fsdp1, mask, lambda model: model.module),
        "a part": refusal(lambda: apply_mask(part, inner)),
    }


def worker(rank: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    found: dict[str, Any] = {name: before_and_after(name) for name in CASES}
    return {
        **found,
        "scored": scored_then_masked(folder),
        "told": refusals(fsdp1, accumulating, rank) | refusals_of_its_own(),
    }


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
    for when in ("after", "after a pass", "after a step"):
        for result in results:
            assert_same_tensors(result[name][when]["state"], result[name]["before"]["state"])
            assert result[name][when]["entries"] == result[name]["before"]["entries"]
        held = sum(result[name][when]["entries"] for result in results)
        assert held == 2 * kept if "shard" not in name and name not in ("ignored", "layers alone") else held >= 2 * kept


def test_what_was_scored_flattened_is_masked_trained_and_saved(results: list[dict[str, Any]], folder: Path) -> None:
    assert_masked_trained_and_saved(*(result["scored"] for result in results), folder=folder / "adapter")


def test_refusals_reach_all_processes(results: list[dict[str, Any]]) -> None:
    for rank, told in enumerate(result["told"] for result in results):
        assert_refused(told, rank)
        assert "Apply the mask outside" in told["within"]
        assert "use_orig_params=True" in told["without names"]
        assert "outermost wrapper" in told["inside"]
        assert "outermost wrapper" in told["a part"]
