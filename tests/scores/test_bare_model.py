"""What is scored is the model itself, whatever training has put around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from device import DEVICE
from tiny import Batch, Rows, assert_scores_close, bert, causal_batch, classification_batch, llama, lora
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fish_tuning import apply_mask, calculate_fisher_information, create_mask_from_fisher
from fish_tuning.scores.bare_model import unwrapped, without_mixed_precision


def scored(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return calculate_fisher_information(model, [batch], progress=False)


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(one[name].cpu(), other[name].cpu()) for name in one)


@pytest.fixture(autouse=True)
def _no_state_of_accelerate_left() -> Iterator[None]:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.parametrize("trainings", [1, 2])
def test_a_bf16_training_before_changes_no_bit(trainings: int, tmp_path: Path) -> None:
    model, batch = lora(llama()), causal_batch()
    before = scored(model, batch)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    args = TrainingArguments(
        str(tmp_path), bf16=True, use_cpu=True, max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True
    )
    for _ in range(trainings):
        Trainer(model, args, train_dataset=Rows(batch)).train()  # type: ignore[arg-type]
    model.to(DEVICE).load_state_dict(weights)
    left = dict(vars(model))
    assert "_original_forward" in left, "accelerate leaves its autocast on the model"
    assert_same_bits(scored(model, batch), before)
    assert all(vars(model)[key] is value for key, value in left.items())


def test_autocast_of_the_base_model_is_taken_off_too() -> None:
    batch = causal_batch()
    before = scored(lora(llama()), batch)
    base = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(llama())
    assert_same_bits(scored(lora(base).to(DEVICE), batch), before)


def test_a_forward_of_the_users_own_stays_under_the_autocast() -> None:
    model, calls = nn.Linear(3, 3), []
    plain = model.forward

    def own(x: Tensor) -> Tensor:
        calls.append(x.dtype)
        return plain(x)

    model.forward = own  # type: ignore[method-assign]
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    wrapped = vars(prepared)["forward"]
    with ExitStack() as stack:
        without_mixed_precision(prepared, stack)
        assert vars(prepared)["forward"] is own
        assert prepared(torch.ones(1, 3)).dtype == torch.float32
    assert vars(prepared)["forward"] is wrapped
    assert len(calls) == 1


def test_hooks_of_the_users_stay_under_the_autocast() -> None:
    model, batch, calls = lora(bert()), classification_batch(), []
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    prepared.register_forward_pre_hook(lambda *_: calls.append(1))
    scored(prepared, batch)
    assert calls


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path / 'store'}")
    yield
    dist.destroy_process_group()


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    model(**classification_batch())
    return model


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.parallel.DistributedDataParallel,
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager")),
        compiled_in_place,
    ],
    ids=["ddp", "data-parallel", "compile", "ddp-of-compile", "compile-in-place"],
)
def test_a_wrapped_model_is_scored_by_the_names_that_apply_mask_takes(wrap: Callable[..., Any]) -> None:
    model, batch = lora(bert()), classification_batch()
    before = scored(model, batch)
    wrapped = wrap(model)
    scores = scored(wrapped, batch)
    assert_same_bits(scores, before)
    assert unwrapped(wrapped) is model
    apply_mask(model, create_mask_from_fisher(scores, 0.1))
    model(**batch).loss.backward()


def test_compiled_layers_are_run_as_they_are_written() -> None:
    model, batch = lora(llama()), causal_batch()
    before = scored(model, batch)
    layers = model.base_model.model.model.layers
    layers[0] = torch.compile(layers[0], backend="eager")
    model(**batch)
    scores = scored(model, batch)
    assert_scores_close({name.replace("_orig_mod.", ""): score for name, score in scores.items()}, before)
