"""Masks that are replaced while they train, against dense optimizers whose gradients and state are masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny import bert, classification_batch, lora, random_mask, tensors
from torch import Tensor, nn

from fish_tuning import (
    MaskError,
    apply_mask,
    count_trainable_parameters,
    get_mask,
    is_masked,
    remove_mask,
    replace_mask,
    save_delta,
)

BATCH = classification_batch()
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.eval()(**BATCH).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def masks(number: int) -> list[dict[str, Tensor]]:
    """Of one size over the pool; some tensors lose all their entries, and gain them again."""
    model = lora(bert())
    made = [random_mask(model, share=0.4, seed=seed, dense=["classifier"]) for seed in range(number)]
    emptied, filled = [name for name in made[0] if "lora" in name][:2]
    made[0][emptied] = torch.zeros_like(made[0][emptied])
    made[1][filled] = torch.ones_like(made[1][filled])
    return made


def slow(kind: str, chosen: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors: gradients outside the mask are zeroed, values there put back, and new entries' state is zero."""
    model = lora(bert())
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = OPTIMIZERS[kind](list(parameters.values()))
    before = None
    for mask in chosen:
        for name, parameter in parameters.items():
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape and before is not None:
                    value.mul_(before[name] & mask[name])
        for _ in range(2):
            model.eval()(**BATCH).loss.backward()
            frozen = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            for name, parameter in parameters.items():
                assert parameter.grad is not None
                parameter.grad.mul_(mask[name])
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(torch.where(mask[name], parameter, frozen[name]))
                    for value in optimizer.state[parameter].values():
                        if isinstance(value, Tensor) and value.shape == parameter.shape:
                            value.mul_(mask[name])
        before = mask
    return tensors(model)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_equals_the_slow_way(kind: str) -> None:
    # The step of a tensor without any entry stands still, so the first mask leaves none without.
    chosen = [random_mask(lora(bert()), share=0.4, seed=seed, dense=["classifier"]) for seed in range(3)]
    model = lora(bert())
    apply_mask(model, chosen[0])
    optimizer = OPTIMIZERS[kind](trainable(model))
    for number, mask in enumerate(chosen):
        if number:
            assert all(torch.equal(m, mask[name]) for name, m in replace_mask(model, mask, optimizer).items())
        for _ in range(2):
            step(model, optimizer)
    expected = slow(kind, chosen)
    for name, tensor in tensors(model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_sizes_follow_and_frozen_entries_stay() -> None:
    first, second, third = masks(3)
    model = lora(bert())
    apply_mask(model, first)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 0.5**number)
    for mask in (second, third, first):
        step(model, optimizer)
        schedule.step()
        before = tensors(model)
        replace_mask(model, mask, optimizer)
        assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        assert [id(p) for p in held] == [id(p) for p in trainable(model)]
        assert (
            sum(p.numel() for p in held)
            == count_trainable_parameters(model)
            == sum(int(m.sum()) for m in mask.values())
        )
        for parameter, state in optimizer.state.items():
            assert {v.shape for v in state.values() if isinstance(v, Tensor) and v.dim()} <= {parameter.shape}
        step(model, optimizer)
        for name, tensor in tensors(model).items():
            frozen = ~mask[name] if name in mask else torch.ones_like(tensor, dtype=torch.bool)
            assert torch.equal(tensor[frozen], before[name][frozen])
    assert schedule.get_last_lr() == [0.01 * 0.5**3]


def test_a_tensor_that_gains_its_first_entries_goes_to_the_group_of_its_like() -> None:
    first, second, _ = masks(3)
    model = lora(bert())
    apply_mask(model, first)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    pool, head = ([p for name, p in named if ("lora" in name) == is_pool] for is_pool in (True, False))
    optimizer = torch.optim.AdamW([{"params": head, "lr": 1e-4}, {"params": pool, "lr": 1e-2}])
    step(model, optimizer)
    replace_mask(model, second, optimizer)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (1e-2 if "lora" in name else 1e-4), name


def test_a_function_chooses_from_the_model_without_its_mask() -> None:
    first, second, _ = masks(3)
    model = lora(bert())
    apply_mask(model, first)
    optimizer = torch.optim.AdamW(trainable(model))
    seen: list[bool] = []

    def choose(model: nn.Module) -> dict[str, Tensor]:
        seen.append(is_masked(model))
        return second

    replace_mask(model, choose, optimizer)
    assert seen == [False]
    assert all(torch.equal(mask, second[name]) for name, mask in get_mask(model).items())


@pytest.mark.parametrize("error", [MaskError, KeyboardInterrupt])
def test_after_an_error_training_goes_on_with_the_mask_before(error: type[BaseException]) -> None:
    first, second, _ = masks(3)
    results = []
    for fails in (False, True):
        model = lora(bert())
        apply_mask(model, first)
        optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
        step(model, optimizer)
        if fails:

            def choose(model: nn.Module) -> dict[str, Tensor]:
                if error is KeyboardInterrupt:
                    raise error
                return {name: mask[:1] for name, mask in second.items()}

            with pytest.raises(error):
                replace_mask(model, choose, optimizer)
        step(model, optimizer)
        results.append(tensors(model))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_what_cannot_be_replaced_is_refused(tmp_path: Path) -> None:
    first, second, _ = masks(3)
    model = lora(bert())
    optimizer = torch.optim.AdamW(trainable(model))
    with pytest.raises(MaskError, match="No mask is applied"):
        replace_mask(model, second, optimizer)
    apply_mask(model, {name: mask for name, mask in first.items() if "classifier" in name or "lora" in name})
    adafactor = torch.optim.Adafactor(trainable(model))
    step(model, adafactor)
    with pytest.raises(MaskError, match="Adafactor keeps 'row_var' of"):
        replace_mask(model, second, adafactor)
    optimizer = torch.optim.AdamW(trainable(model))
    replace_mask(model, second, optimizer)
    with pytest.raises(MaskError, match="The mask was replaced while it trained"):
        save_delta(model, tmp_path / "delta.safetensors")
    remove_mask(model)
    assert not is_masked(model)


@pytest.mark.parametrize("fails", [False, True])
def test_masks_of_other_adapters_stay(fails: bool) -> None:
    model = lora(bert())
    model.add_adapter("b", LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    apply_mask(model, random_mask(model, seed=0, dense=["classifier"]))
    idle = get_mask(model, "default")
    model.set_adapter("b")
    mine = random_mask(model, seed=1, dense=["classifier"])
    apply_mask(model, mine)
    optimizer = torch.optim.AdamW(trainable(model))
    step(model, optimizer)
    other = {name: mask if "classifier" in name else ~mask for name, mask in mine.items()}
    if fails:
        with pytest.raises(MaskError, match="nothing to choose"):
            replace_mask(model, stops, optimizer)
    else:
        replace_mask(model, other, optimizer)
    expected = mine if fails else other
    now = get_mask(model, "b")
    assert all(torch.equal(mask, expected[name]) for name, mask in now.items() if "lora" in name)
    assert all(torch.equal(mask, idle[name]) for name, mask in get_mask(model, "default").items() if "lora" in name)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert held == [id(parameter) for parameter in trainable(model)]
    step(model, optimizer)


def stops(model: nn.Module) -> dict[str, Tensor]:
    raise MaskError("nothing to choose")
