"""What is scored is scored in the precision and with the checkpointing of a Trainer, and the model is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Rows, bert, causal_batch, classification_batch, llama, lora, rebatch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fish_tuning import calculate_scores, fish_tune, get_mask
from fish_tuning.training.as_trained import as_trained


def arguments(folder: Path, **others: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
                             max_steps=1, per_device_train_batch_size=4, **others)  # fmt: skip


def scored(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return calculate_scores(model, rebatch(batch, 4), warmup_steps=2, progress=False)


def traces(model: nn.Module) -> list[Any]:
    """What checkpointing leaves on modules."""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func", "_require_grads_hooks", "_require_grads_hook")
    return [
        ({name: id(vars(module)[name]) for name in names if name in vars(module)}, list(module._forward_hooks))
        for module in model.modules()
    ]


@pytest.mark.parametrize("settings", [None, {"use_reentrant": True}, {"every_n_layers": 2}])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_checkpointing_is_on_within_and_changes_no_bit(tmp_path: Path, name: str, settings: Any) -> None:
    model = lora(llama()) if name == "llama" else lora(bert())
    batch = causal_batch() if name == "llama" else classification_batch()
    before, plain, recomputed = traces(model), scored(model, batch), []
    args = arguments(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs=settings)
    inner = next(m for name, m in model.named_modules() if name.endswith((".0.attention", ".0.self_attn")))
    handle = inner.register_forward_pre_hook(lambda *_: recomputed.append(torch._C._current_graph_task_id() != -1))
    with as_trained(model, args):
        found = scored(model, batch)
    handle.remove()
    assert True in recomputed, "no layer was computed again in the backward pass"
    assert traces(model) == before
    assert all(torch.equal(found[name], score) for name, score in plain.items())


def test_checkpointing_that_is_on_already_stays(tmp_path: Path) -> None:
    model = lora(llama())
    model.activation_checkpointing_enable()
    before = traces(model)
    with as_trained(model, arguments(tmp_path, activation_checkpointing=True)):
        assert traces(model) == before
    assert traces(model) == before


def test_the_model_is_as_it_was_after_an_error(tmp_path: Path) -> None:
    model = lora(llama())
    before = traces(model)
    args = arguments(tmp_path, activation_checkpointing=True, bf16=True)
    with pytest.raises(ZeroDivisionError), as_trained(model, args):
        raise ZeroDivisionError
    assert traces(model) == before
    assert not torch.is_autocast_enabled("cpu")


def test_a_models_refusal_is_told_as_it_comes(tmp_path: Path) -> None:
    model = lora(bert())
    model.base_model.model.supports_gradient_checkpointing = False
    before = traces(model)
    args = arguments(tmp_path, activation_checkpointing=True)
    with pytest.raises(ValueError, match="does not support"), as_trained(model, args):
        pass
    assert traces(model) == before


@pytest.mark.parametrize("bf16", [False, True])
def test_scores_are_those_of_the_autocast_that_trains(tmp_path: Path, bf16: bool) -> None:
    model, batch = lora(bert()), classification_batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        asked = scored(model, batch)
    with as_trained(model, arguments(tmp_path, bf16=bf16)):
        found = scored(model, batch)
    assert all(torch.equal(found[name], score) for name, score in asked.items())
    plain = scored(model, batch)
    assert bf16 == any(not torch.equal(found[name], score) for name, score in plain.items())


@pytest.mark.parametrize("bf16", [False, True])
def test_one_call_scores_as_it_trains(tmp_path: Path, bf16: bool) -> None:
    model, batch = lora(bert()), classification_batch()
    head = model.base_model.model.classifier
    kinds: list[torch.dtype] = []
    head.register_forward_hook(lambda _, inputs, output: kinds.append(output.dtype))
    trainer = Trainer(model, arguments(tmp_path, bf16=bf16, activation_checkpointing=True), train_dataset=Rows(batch))  # type: ignore[arg-type]
    fish_tune(trainer, keep_ratio=0.2, num_samples=4, progress=False)
    assert set(kinds) == {torch.bfloat16 if bf16 else torch.float32}
    assert get_mask(model)
