"""A training step of a masked model waits for no GPU, and sends it nothing, beyond what the same step does without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_waits import DeviceWaits
from tiny import bert, causal_batch, classification_batch, llama, lora, random_mask
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from fish_tuning import FishMaskCallback, apply_mask
from fish_tuning.sparse.groups import Group


def steps(
    model: nn.Module, batch: dict[str, torch.Tensor], number: int, after: Any = lambda model: None
) -> DeviceWaits:
    """Forward, backward, clipping and a step of the optimizer as the Trainer makes it; the first one is not counted."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01, fused=True)

    def step() -> None:
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after(model)

    step()
    with DeviceWaits(own=lambda line: "fish_tuning/" in line or "/transformers/" in line) as waits:
        for _ in range(number):
            step()
    return waits


@pytest.mark.parametrize("large", [False, True], ids=["in groups", "one by one"])
@pytest.mark.parametrize(
    ("model", "batch"), [(bert, classification_batch), (llama, causal_batch)], ids=["bert", "llama"]
)
def test_a_step_waits_for_nothing_of_ours(model: Any, batch: Any, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr("fish_tuning.sparse.groups._SMALL", 0)
    plain = steps(lora(model()).train(), batch(), 3)
    masked = lora(model()).train()
    apply_mask(masked, random_mask(masked))
    waits = steps(masked, batch(), 3)
    assert waits.counts == plain.counts
    assert not any("fish_tuning/" in line for line in waits.counts)


def test_the_callback_waits_for_nothing(tmp_path: Any) -> None:
    model = lora(bert()).train()
    callback = FishMaskCallback(random_mask(model))
    arguments, state, control = TrainingArguments(str(tmp_path)), TrainerState(max_steps=9), TrainerControl()
    callback.on_init_end(arguments, state, control, model=model)
    waits = steps(
        model, classification_batch(), 3, lambda model: callback.on_step_end(arguments, state, control, model=model)
    )
    assert not any("fish_tuning/" in line for line in waits.counts)


def test_a_look_at_the_values_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Group.write

    def looking(group: Group) -> None:
        write(group)
        bool(group.members[0].frozen.any())

    looking.__code__ = looking.__code__.replace(co_filename="fish_tuning/sparse/whole_tensors.py")
    monkeypatch.setattr(Group, "write", looking)
    model = lora(bert()).train()
    apply_mask(model, random_mask(model))
    assert any("fish_tuning/sparse" in line for line in steps(model, classification_batch(), 1).counts)
