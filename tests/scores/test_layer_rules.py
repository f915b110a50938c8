"""Every rule against autograd, one example at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

import fish_tuning.scores.example_gradients as example_gradients
import fish_tuning.scores.layer_rules as per_example
from fish_tuning import register_rule
from fish_tuning.scores.layer_rules import rule_for


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


IDS = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(1))

LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(6, 3), floats(4, 5, 6)),
    "linear-no-bias": (lambda: nn.Linear(6, 3, bias=False), floats(4, 5, 6)),
    "linear-one-position": (lambda: nn.Linear(6, 3), floats(4, 1, 6)),
    "embedding": (lambda: nn.Embedding(7, 3), IDS),
    "embedding-padding": (lambda: nn.Embedding(7, 3, padding_idx=2), IDS),
    "embedding-padding-from-the-end": (lambda: nn.Embedding(7, 3, padding_idx=-1), IDS),
    "layer-norm": (lambda: nn.LayerNorm(6), floats(4, 5, 6)),
    "layer-norm-no-bias": (lambda: nn.LayerNorm(6, bias=False), floats(4, 5, 6)),
    "layer-norm-two-dimensions": (lambda: nn.LayerNorm((2, 6)), floats(4, 5, 2, 6)),
    "rms-norm": (lambda: nn.RMSNorm(6), floats(4, 5, 6)),
    "rms-norm-eps": (lambda: nn.RMSNorm(6, eps=0.1), floats(4, 5, 6)),
    "llama-rms-norm": (lambda: LlamaRMSNorm(6, eps=0.1), floats(4, 5, 6)),
    "conv1d-of-gpt2": (lambda: Conv1D(3, 6), floats(4, 5, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 2), floats(4, 2, 5, 4)),
    "conv2d-all-options": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), groups=2), floats(4, 4, 7, 6)),
    "conv2d-depthwise": (lambda: nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False), floats(4, 3, 5, 4)),
    "gemma-rms-norm": (lambda: GemmaRMSNorm(6, eps=0.1), floats(4, 5, 6)),
}


@pytest.mark.parametrize("large", [2**17, 0], ids=["many-at-once", "one-by-one"])
@pytest.mark.parametrize("chunk", [2**24, 20])
@pytest.mark.parametrize("case", LAYERS)
def test_rule_gives_the_sums_of_gradients_and_of_their_squares(
    case: str, chunk: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example_gradients, "CHUNK_ENTRIES", chunk)
    monkeypatch.setattr(example_gradients, "_LARGE", large)
    monkeypatch.setattr(example_gradients, "_LARGE_ON_GPU", large)
    make, x = LAYERS[case]
    layer = make()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    g = floats(*layer(x).shape)
    expected = {name: torch.zeros_like(parameter) for name, parameter in layer.named_parameters()}
    sums = {name: torch.zeros_like(parameter) for name, parameter in layer.named_parameters()}
    for row in range(len(x)):
        gradients = torch.autograd.grad(layer(x[row : row + 1]), list(layer.parameters()), g[row : row + 1])
        for name, gradient in zip(expected, gradients, strict=True):
            expected[name] += gradient**2
            sums[name] += gradient
    rule = rule_for(layer)
    assert rule is not None
    assert rule.parameters(layer) == list(expected)
    gradients = rule.gradients(layer, *rule.positions(layer, rule.keep(layer, x, layer(x)), g))
    for name, total in expected.items():
        found = gradients[name]
        assert not isinstance(found, Tensor)
        for by_rule, by_autograd in ((found.squares(), total), (found.sum(), sums[name])):
            dense = by_rule.to_dense() if by_rule.is_sparse else by_rule
            torch.testing.assert_close(dense, by_autograd.detach(), rtol=1e-5, atol=2e-6)


def test_rules_come_by_type_and_its_parents() -> None:
    class Narrow(nn.Linear):
        pass

    assert rule_for(Narrow(2, 2)) is rule_for(nn.Linear(2, 2))
    assert rule_for(nn.Conv1d(2, 2, 1)) is None


def test_a_convolution_that_pads_otherwise_than_with_zeros_has_no_rule() -> None:
    layer = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
    rule = rule_for(layer)
    assert rule is not None
    assert rule.parameters(layer) == []


def test_a_table_whose_gradients_depend_on_how_often_its_rows_are_read_has_no_rule() -> None:
    rule = rule_for(nn.Embedding(7, 3))
    assert rule is not None
    assert rule.parameters(nn.Embedding(7, 3)) == ["weight"]
    assert rule.parameters(nn.Embedding(7, 3, scale_grad_by_freq=True)) == []


def test_register_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_example, "_RULES", dict(per_example._RULES))

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    @register_rule(Scale)
    def scale(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        return {"weight": (x * g).sum(1)}

    rule = rule_for(Scale())
    assert rule is not None
    assert rule.gradients is scale


def test_register_rule_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_example, "_RULES", dict(per_example._RULES))

    @register_rule("torch.nn.modules.sparse.EmbeddingBag", parameters=lambda module: ["weight"])
    def bag(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        return {}

    rule = rule_for(nn.EmbeddingBag(2, 2))
    assert rule is not None
    assert rule.gradients is bag
