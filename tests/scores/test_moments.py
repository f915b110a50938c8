"""Mean gradients and mean squares from one pass: rules, the loop and autograd agree."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from tiny import (
    Batch,
    assert_scores_close,
    bert,
    causal_batch,
    classification_batch,
    examples,
    image_batch,
    llama,
    lora,
    rebatch,
    reference_fisher,
    vit,
)
from torch import Tensor, nn

from fish_tuning import FisherError, FishTuningWarning, Moments, calculate_fisher_information, measure_moments
from fish_tuning.scores.example_gradients import OuterProducts
from fish_tuning.scores.layer_rules import _RULES, Gradients, register_rule

pytestmark = pytest.mark.filterwarnings("ignore::fish_tuning.FishTuningWarning")


def measured(model: nn.Module, loader: Batch | list[Batch], **kwargs: object) -> Moments:
    batches = [loader] if isinstance(loader, dict) else loader
    return measure_moments(model, batches, warmup_steps=0, progress=False, **kwargs)  # type: ignore[arg-type]


def reference_gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The definition: transformers' own loss on each unpadded row alone."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    rows = list(examples(batch))
    model.eval()
    losses = torch.stack([model(**row).loss for row in rows])
    gradients = torch.autograd.grad(losses.mean(), list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }


def peft(config: PeftConfig) -> Callable[[], nn.Module]:
    return lambda: get_peft_model(bert(), config)


DORA = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], use_dora=True, init_lora_weights=False)
IA3 = IA3Config(task_type="SEQ_CLS", target_modules=["key", "output.dense"], feedforward_modules=["output.dense"])
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "lora": (lambda: lora(bert()), classification_batch),
    "lora-b-is-zero": (lambda: lora(bert(), init_lora_weights=True), classification_batch),
    "all-of-bert": (bert, classification_batch),
    "all-of-llama-left": (llama, lambda: causal_batch(side="left")),
    "tied": (lambda: llama(tie_word_embeddings=True), causal_batch),
    "vit": (vit, image_batch),
    "dora": (peft(DORA), classification_batch),
    "ia3": (peft(IA3), classification_batch),
}


@pytest.mark.parametrize("method", ["auto", "loop"])
@pytest.mark.parametrize("case", CASES)
def test_moments_equal_the_definition(case: str, method: str) -> None:
    make_model, make_batch = CASES[case]
    model, batch = make_model(), make_batch()
    moments = measured(model, batch, method=method)
    gradients = reference_gradients(model, batch)
    assert any(gradient.any() for gradient in gradients.values())
    assert_scores_close(moments.mean_squares, reference_fisher(model, batch))
    assert_gradients_close(moments.mean_gradients, gradients)


def assert_gradients_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient.detach().float(), rtol=1e-4, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("case", ["lora", "lora-b-is-zero", "all-of-bert"])
def test_batches_make_no_difference(case: str, size: int) -> None:
    """Checked batches are weighted at random, which must not show."""
    make_model, make_batch = CASES[case]
    model, batch = make_model(), make_batch()
    whole = measured(model, batch)
    split = measured(model, rebatch(batch, size))
    assert_gradients_close(split.mean_gradients, whole.mean_gradients)


class Reads(nn.Module):
    loss_type = "ForSequenceClassification"

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.bag = nn.Embedding(12, 6, sparse=sparse), nn.EmbeddingBag(12, 6, sparse=sparse)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.table(ids).tanh().mean(1) + self.bag(ids)))


@pytest.mark.parametrize("method", ["auto", "loop"])
def test_tables_with_sparse_gradients(method: str) -> None:
    ids = torch.randint(12, (4, 7), generator=torch.Generator().manual_seed(0))
    batch = {"ids": ids, "labels": torch.arange(4) % 3}
    sparse, dense = Reads(True), Reads(False)
    for steps in (0, 2):
        options = {"method": method, "warmup_steps": steps, "progress": False}
        found, expected = (measure_moments(model, [batch], **options) for model in (sparse, dense))  # type: ignore[arg-type]
        assert_scores_close(found.mean_squares, expected.mean_squares)
        assert_gradients_close(found.mean_gradients, expected.mean_gradients)
    assert sparse.table.sparse
    assert sparse.bag.sparse


def test_without_gradients_it_is_the_fisher_information() -> None:
    model, batch = lora(bert()), classification_batch()
    alone = measured(model, batch, gradients=False)
    fisher = calculate_fisher_information(model, [batch], progress=False)
    assert alone.mean_gradients == {}
    assert alone.num_samples == len(batch["labels"])
    both = measured(model, batch)
    for name, scores in fisher.items():
        assert torch.equal(scores, alone.mean_squares[name])
        assert torch.equal(scores, both.mean_squares[name])


def test_bf16_weights_are_measured_in_fp32() -> None:
    model, batch = lora(bert()).to(torch.bfloat16), classification_batch()
    moments = measured(model, batch)
    assert all(gradient.dtype == torch.float32 for gradient in moments.mean_gradients.values())
    loop = measured(model, batch, method="loop")
    for name, gradient in loop.mean_gradients.items():
        torch.testing.assert_close(moments.mean_gradients[name], gradient, rtol=0.2, atol=5e-3)


@pytest.mark.parametrize("fisher_type", ["sampled", "expected"])
def test_gradients_of_drawn_labels_are_refused(fisher_type: str) -> None:
    with pytest.raises(FisherError, match="zero but for chance"):
        measured(bert(), classification_batch(), fisher_type=fisher_type)


def negated_linear(module: nn.Module, x: Tensor, g: Tensor) -> Gradients:
    """Right squares, wrong signs."""
    return {"weight": OuterProducts(-g, x)}


@pytest.mark.filterwarnings("default::fish_tuning.FishTuningWarning")
@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize("case", ["lora", "lora-b-is-zero"])
def test_wrong_signs_are_found_out(case: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At B = 0, A's rule cannot be proven and must add nothing wrong."""
    make_model, make_batch = CASES[case]
    model, batch = make_model(), make_batch()
    for parameter in [parameter for name, parameter in model.named_parameters() if "lora" not in name]:
        parameter.requires_grad_(False)  # PEFT's factors have no bias, as the rule below
    monkeypatch.setitem(_RULES, nn.Linear, replace(_RULES[nn.Linear], gradients=negated_linear))
    with pytest.warns(FishTuningWarning, match="does not agree"):
        moments = measured(model, rebatch(batch, size))
    assert_gradients_close(moments.mean_gradients, reference_gradients(model, batch))
    assert_scores_close(moments.mean_squares, reference_fisher(model, batch))


def test_wrong_signs_are_found_out_once_a_gradient_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that the first examples do not reach: what proves its rule is the whole batch's gradient."""
    model = Gated()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    x[:, 0] = -1.0
    x[5, 0] = 1.0
    batch = {"x": x, "labels": torch.arange(8) % 3}
    reference = reference_gradients(model, batch)
    assert reference["layer.weight"].any()
    right = measured(model, rebatch(batch, 2))
    assert_gradients_close(right.mean_gradients, reference)
    monkeypatch.setitem(_RULES, nn.Linear, replace(_RULES[nn.Linear], gradients=negated_linear))
    assert_gradients_close(measured(model, rebatch(batch, 2)).mean_gradients, reference)


class Gated(nn.Module):
    """A layer that counts on those rows alone whose first entry is positive."""

    loss_type = "ForSequenceClassification"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> object:
        logits = self.head(x + (x[:, :1] > 0).float() * self.layer(x))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return type("Output", (), {"logits": logits, "loss": loss})()


@pytest.mark.filterwarnings("default::fish_tuning.FishTuningWarning")
@pytest.mark.parametrize("case", CASES)
def test_right_rules_are_not_doubted_for_their_signs(case: str) -> None:
    make_model, make_batch = CASES[case]

    def doubted(**kwargs: bool) -> list[str]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            measured(make_model(), rebatch(make_batch(), 2), **kwargs)
        return [str(warning.message) for warning in told if issubclass(warning.category, FishTuningWarning)]

    assert doubted() == doubted(gradients=False)


def test_squares_for_gradients_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fish_tuning.scores.layer_rules._RULES", dict(_RULES))

    @register_rule(nn.Linear)
    def squares(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        return {"bias": g.sum(1).square().sum(0)}

    with pytest.raises(FisherError, match="must give each example's gradient"):
        measured(bert(), classification_batch())
