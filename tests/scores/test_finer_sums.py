"""Gradients of 16 bits on a CPU, added up in fp32: nearer the truth, and nothing else changed."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tiny import assert_scores_close, bert, classification_batch
from torch import Tensor, nn

from fish_tuning import FishTuningWarning, calculate_fisher_information
from fish_tuning.scores.finer_sums import finer_forward


def given(kind: str) -> tuple[nn.Module, Tensor]:
    """A layer and 1,000 positions whose gradients point the same way, so that coarse sums stop growing."""
    torch.manual_seed(0)
    if kind == "embedding":
        return nn.Embedding(3, 8, padding_idx=2), torch.arange(1000).reshape(4, 250) % 3
    layer = nn.LayerNorm(8, bias=kind != "no bias") if kind != "two dimensions" else nn.LayerNorm((4, 2))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer, torch.randn(4, 250, *layer.normalized_shape)


def passed(layer: nn.Module, x: Tensor, forward: object = None) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    x = x.clone().requires_grad_(x.is_floating_point())
    output = (forward or layer)(x)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(1)
    output.backward((1 + torch.randn(output.shape, generator=generator)).to(output.dtype))
    return output.detach(), {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}, x.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["layer norm", "no bias", "two dimensions", "embedding"])
def test_sums_are_finer_and_the_rest_keeps_its_bits(kind: str, dtype: torch.dtype) -> None:
    exact, x = given(kind)
    x = x.to(dtype) if x.is_floating_point() else x
    coarse, fine = (copy.deepcopy(exact).to(dtype) for _ in range(2))
    exact = copy.deepcopy(coarse).float()
    output, by_torch, of_input = passed(coarse, x)
    same, gradients, same_of_input = passed(fine, x, finer_forward(fine))
    assert torch.equal(output, same)
    assert same.dtype == dtype
    assert of_input is None or torch.equal(of_input, same_of_input)  # type: ignore[arg-type]
    _, wanted, _ = passed(exact, x.float() if x.is_floating_point() else x)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        off, was = (
            float((each.float() - wanted[name]).norm() / wanted[name].norm()) for each in (gradient, by_torch[name])
        )
        assert off < 2 * torch.finfo(dtype).eps
        assert was > off
    if kind == "embedding":
        assert not gradients["weight"][2].any(), "the padding's row has no gradient"


class Own(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_another_forward_pass_is_left_alone() -> None:
    wrapped = nn.LayerNorm(8)
    wrapped.forward = Own(8).forward  # type: ignore[method-assign]
    assert finer_forward(wrapped) is None
    assert finer_forward(Own(8)) is None
    for other in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        assert finer_forward(nn.Embedding(3, 8, **other)) is None  # type: ignore[arg-type]
    assert finer_forward(nn.Linear(3, 8)) is None
    assert finer_forward(nn.LayerNorm(8, device="meta")) is None
    assert finer_forward(nn.LayerNorm(8, elementwise_affine=False)) is None


@pytest.mark.parametrize("kind", ["layer norm", "embedding"])
def test_in_32_bits_all_bits_are_kept(kind: str) -> None:
    layer, x = given(kind)
    other = copy.deepcopy(layer)
    (output, by_torch, _), (same, gradients, _) = passed(layer, x), passed(other, x, finer_forward(other))
    assert torch.equal(output, same)
    assert all(torch.equal(gradient, by_torch[name]) for name, gradient in gradients.items())


def test_weights_of_32_bits_under_an_autocast() -> None:
    layer, x = given("layer norm")
    off = []
    for forward in (layer, finer_forward(layer)):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            _, gradients, _ = passed(layer, x.bfloat16(), forward)
        layer.zero_grad()
        _, wanted, _ = passed(layer, x.bfloat16().float())
        off.append(max(float((gradients[name] - wanted[name]).norm() / wanted[name].norm()) for name in gradients))
    assert off[1] < 0.01
    assert off[1] < off[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whole_models_in_16_bits_go_by_their_rules(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """Of long texts: torch's sums would be off by more than the proofs let pass."""
    model, batch = bert(max_position_embeddings=300).to(dtype), classification_batch((290, 300, 280, 295))
    with caplog.at_level("INFO", "fish_tuning"), warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        scores = calculate_fisher_information(model, [batch], progress=False)
    assert "by the loop" not in caplog.text
    assert "done again" not in caplog.text
    assert not any("forward" in vars(module) for module in model.modules())
    by_loop = calculate_fisher_information(model, [batch], method="loop", progress=False)
    rounding = [name for name in scores if "key.bias" in name]  # zero but for it
    for each in (scores, by_loop):
        for name in rounding:
            del each[name]
    assert_scores_close(scores, by_loop, tolerance=0.1)
