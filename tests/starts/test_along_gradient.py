"""Adapters that start along the gradient, against the SVD of what autograd gives for each example alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import (
    assert_same_tensors,
    bert,
    causal_batch,
    classification_batch,
    examples,
    image_batch,
    llama,
    lora,
    random_mask,
    rebatch,
    tensors,
    vit,
)
from torch import Tensor, nn

from fish_tuning import FisherError, FishTuningWarning, apply_mask, start_along_gradient
from fish_tuning.starts.along_gradient import gradient_directions, leading_rows, lora_layers, set_directions

Make = Callable[..., Any]
START = {"init_lora_weights": True, "rank": 2}
CASES: dict[str, tuple[Make, Make]] = {
    "bert": (lambda **config: lora(bert(), **{**START, **config}), classification_batch),
    "llama": (lambda **config: lora(llama(), **{**START, **config}), causal_batch),
    "vit": (lambda **config: lora(vit(), **{**START, **config}), image_batch),
}


def by_hand(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean gradient of each adapted weight, with transformers' loss on each unpadded row alone."""
    model.eval()
    _, layers = lora_layers(model, None)
    weights = {name: layer.get_base_layer().weight.requires_grad_() for name, layer in layers.items()}
    rows = list(examples(batch))
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for row in rows:
        for name, gradient in zip(weights, torch.autograd.grad(model(**row).loss, list(weights.values())), strict=True):
            totals[name] += gradient
    for weight in weights.values():
        weight.requires_grad_(False)
    return {name: total / len(rows) for name, total in totals.items()}


def factors(model: Any, name: str) -> tuple[Tensor, Tensor]:
    layer = model.get_submodule(name)
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_the_leading_singular_vectors(case: str, size: int, config: dict[str, Any]) -> None:
    make_model, make_batch = CASES[case]
    model, batch = make_model(**config), make_batch()
    gradients = by_hand(model, batch)
    start_along_gradient(model, rebatch(batch, size), progress=False)
    for name, gradient in gradients.items():
        a, b = factors(model, name)
        values = torch.linalg.svdvals(gradient)
        torch.testing.assert_close(3 * a @ a.T, torch.eye(2, device=a.device))
        # The norm of the gradient along each row says whether it is the right one, whatever its sign.
        torch.testing.assert_close((gradient @ a.T).norm(dim=0) * 3**0.5, values[:2], rtol=1e-3, atol=1e-6)
        assert not b.any()


@pytest.mark.parametrize("case", CASES)
def test_the_function_and_all_else_stay(case: str) -> None:
    make_model, make_batch = CASES[case]
    model, batch = make_model(), make_batch()
    model.train()
    before, flags = tensors(model), [parameter.requires_grad for parameter in model.parameters()]
    outputs = model.eval()(**batch).logits
    model.train()
    start_along_gradient(model, [batch], progress=False)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    after = tensors(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora_A" in name}
    assert torch.equal(model.eval()(**batch).logits, outputs)
    assert not any(module._forward_hooks for module in model.modules())


def test_runs_are_equal_bit_for_bit_whatever_was_there() -> None:
    one, other = CASES["bert"][0](), CASES["bert"][0](seed=5, use_rslora=True, lora_alpha=99)
    for model in (one, other):
        start_along_gradient(model, rebatch(classification_batch(), 2), progress=False)
    _, layers = lora_layers(one, None)
    for name in layers:
        assert torch.equal(factors(one, name)[0], factors(other, name)[0])
    again = tensors(one)
    start_along_gradient(one, rebatch(classification_batch(), 2), progress=False)
    assert_same_tensors(again, tensors(one))


def test_activation_checkpointing_changes_nothing() -> None:
    plain, checkpointed = CASES["llama"][0](), CASES["llama"][0]()
    checkpointed.gradient_checkpointing_enable()
    one, other = (gradient_directions(m, [causal_batch()], progress=False) for m in (plain, checkpointed))
    for name in one:
        torch.testing.assert_close(one[name], other[name])


def test_sixteen_bits() -> None:
    exact = CASES["llama"][0]()
    model = CASES["llama"][0]().to(torch.bfloat16)
    gradients = by_hand(exact, causal_batch())
    start_along_gradient(model, [causal_batch()], progress=False)
    for name, gradient in gradients.items():
        a = factors(model, name)[0]
        assert a.dtype == torch.bfloat16
        caught = (gradient @ a.float().T).square().sum() * 3
        assert caught > 0.97 * torch.linalg.svdvals(gradient)[:2].square().sum(), name


def test_stock_peft_loads_it(tmp_path: Path) -> None:
    model, batch = CASES["bert"][0](), classification_batch()
    start_along_gradient(model, [batch], progress=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
    for name in lora_layers(model, None)[1]:
        assert torch.equal(factors(loaded, name)[0], factors(model, name)[0])


def test_directions_taken_elsewhere() -> None:
    """As after some warm-up steps: the gradient is that of the weights as they are, B included; A is set at B = 0."""
    model, batch = CASES["bert"][0](), classification_batch()
    start = tensors(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    gradients = by_hand(model, batch)
    directions = gradient_directions(model, [batch], progress=False)
    with pytest.raises(FisherError, match="is not 0"):
        set_directions(model, directions)
    model.load_state_dict(start)
    set_directions(model, directions)
    for name, gradient in gradients.items():
        a, _ = factors(model, name)
        torch.testing.assert_close(
            (gradient @ a.T).norm(dim=0) * 3**0.5, torch.linalg.svdvals(gradient)[:2], rtol=1e-3, atol=1e-6
        )


def test_rows_beyond_the_rank_of_the_gradient_stay() -> None:
    model = CASES["bert"][0](rank=20)
    before = {name: factors(model, name)[0].clone() for name in lora_layers(model, None)[1]}
    with pytest.warns(FishTuningWarning, match="lower rank than their adapters"):
        start_along_gradient(model, [classification_batch()], progress=False)
    for name, a in before.items():
        now = factors(model, name)[0]
        assert torch.equal(now[16:], a[16:])
        assert not torch.equal(now[:1], a[:1])


def test_leading_rows_leave_rounding_out() -> None:
    row = torch.tensor([[0.0, -3.0, 4.0]])
    gradient = torch.tensor([[1.0], [2.0]]) @ row
    torch.testing.assert_close(leading_rows(gradient, 2), row / 5)
    assert leading_rows(torch.zeros(3, 4), 2).shape == (0, 4)
    with pytest.raises(FisherError, match="not finite"):
        leading_rows(torch.full((2, 2), torch.inf), 1)


def test_another_adapter_is_left_alone() -> None:
    model: Any = CASES["bert"][0]()
    model.add_adapter("other", model.peft_config["default"])
    before = tensors(model)
    start_along_gradient(model, [classification_batch()], progress=False)
    moved = {name for name, tensor in tensors(model).items() if not torch.equal(tensor, before[name])}
    assert moved
    assert not any("other" in name for name in moved)
    with pytest.raises(FisherError, match="not the only active one"):
        start_along_gradient(model, [classification_batch()], adapter_name="other", progress=False)


def test_what_cannot_start_along_a_gradient() -> None:
    batch = classification_batch()
    with pytest.raises(FisherError, match="no LoRA layer"):
        start_along_gradient(bert(), [batch], progress=False)
    model = CASES["bert"][0](init_lora_weights="pissa")
    with pytest.raises(FisherError, match="is not 0"):
        start_along_gradient(model, [batch], progress=False)
    embedded = CASES["bert"][0](target_modules=["word_embeddings"])
    with pytest.raises(FisherError, match="only adapters of linear layers"):
        start_along_gradient(embedded, [batch], progress=False)
    masked = CASES["bert"][0]()
    apply_mask(masked, random_mask(masked, dense=["classifier"]))
    with pytest.raises(FisherError, match="mask applied"):
        start_along_gradient(masked, [batch], progress=False)
    merged = CASES["bert"][0]()
    merged.merge_adapter()
    with pytest.raises(FisherError, match="merged"):
        start_along_gradient(merged, [batch], progress=False)
    with pytest.raises(FisherError, match="no example"):
        start_along_gradient(CASES["bert"][0](), [], progress=False)
