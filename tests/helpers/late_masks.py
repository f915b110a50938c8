"""Masks that come after FSDP has the model: what holds for both of its versions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engines import adamw
from processes import refusal
from tiny import (
    assert_only_selected_moved,
    assert_same_tensors,
    bert,
    classification_batch,
    lora,
    random_mask,
)
from tiny import tensors as tensors_of
from torch import Tensor, nn

from fish_tuning import apply_mask, count_trainable_parameters, load_mask

BATCH = classification_batch((5, 9, 3, 7, 9, 4, 8, 6))
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
Wrap = Callable[[Any], Any]


def adapted(seed: int = 0) -> Any:
    return lora(bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), seed=seed, lora_dropout=0.0)


def mask_of(model: nn.Module) -> dict[str, Tensor]:
    """With a tensor that keeps nothing, and the head dense; by the names without activation checkpointing."""
    mask = random_mask(model, 0.3, dense=["classifier"])
    mask = {name.replace("_checkpoint_wrapped_module.", ""): selected for name, selected in mask.items()}
    first = next(name for name in mask if "classifier" not in name)
    return mask | {first: torch.zeros_like(mask[first])}


def without_a_factor(model: nn.Module) -> dict[str, Tensor]:
    """With one layer's adapter that keeps nothing."""
    return mask_of(model) | {name: torch.zeros_like(m) for name, m in mask_of(model).items() if QUERY in name}


def passed(model: Any) -> Any:
    """After a pass, FSDP2 leaves the root's parameters gathered, and FSDP1 has noted which wrapper is whose."""
    with torch.no_grad():
        model(**BATCH)
    return model


def refused(wrap: Wrap, mask: Any, prepare: Wrap = lambda model: model) -> str:
    """What `apply_mask` says of a model that is wrapped and prepared so."""
    model = prepare(wrap(adapted()))
    return refusal(lambda: apply_mask(model, mask))


def refusals(wrap: Wrap, accumulating: Wrap, rank: int) -> dict[str, str]:
    """`accumulating` does a pass whose gradients are not reduced."""
    mask = mask_of(adapted())
    other = mask | {f"{QUERY}.lora_B.default.weight": torch.rand(16, 4) < 0.5 + 0.3 * rank}
    unknown = {"nothing": torch.ones(2, dtype=torch.bool)}
    twice, early = wrap(adapted()), wrap(adapted())
    apply_mask(twice, mask)
    optimizer = adamw(early)
    apply_mask(early, mask)
    early(**BATCH).loss.backward()
    return {
        "different": refused(wrap, other),
        "one process": refused(wrap, unknown if rank == 1 else mask),
        "shape": refused(wrap, {f"{QUERY}.lora_B.default.weight": torch.zeros(3, dtype=torch.bool)}),
        "accumulating": refused(wrap, mask, accumulating),
        "early optimizer": refusal(optimizer.step),
        "twice": refusal(lambda: apply_mask(twice, mask)),
    }


def assert_refused(told: dict[str, str], rank: int) -> None:
    assert "different masks" in told["different"]
    assert ("Process 1 of 2 cannot apply the mask" in told["one process"]) == (rank == 0)
    assert "names 'nothing'" in told["one process"]
    assert "of shape (3,)" in told["shape"]
    assert "Apply the mask before or after the accumulation" in told["accumulating"]
    assert "AdamW was made before apply_mask" in told["early optimizer"]
    assert "has a mask already" in told["twice"]


def assert_masked_trained_and_saved(one: dict[str, Any], other: dict[str, Any], folder: Path) -> None:
    """Of two processes that scored a model in the hands of FSDP, masked it, trained it and saved it."""
    kept = sum(int(selected.sum()) for selected in one["mask"].values())
    assert one["held"] + other["held"] == kept
    assert one["entries"] + other["entries"] == 2 * kept
    start = adapted()
    assert_only_selected_moved(tensors_of(start), one["state"], one["mask"])
    stored = load_mask(folder)
    assert_same_tensors(stored, one["mask"])
    apply_mask(start, stored)
    assert count_trainable_parameters(start) == kept
