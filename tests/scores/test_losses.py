"""Per-example losses against transformers' own loss on the example alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device import DEVICE
from tiny import (
    bert,
    causal_batch,
    classification_batch,
    examples,
    llama,
    llama_classifier,
    regression_batch,
    text_batch,
)
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from fish_tuning import FisherError, calculate_fisher_information
from fish_tuning.scores.losses import IGNORED, align_labels, example_losses, labels_of, resolve_likelihood


def losses_of(
    model: nn.Module, batch: dict[str, Tensor], fisher_type: str = "empirical", seed: int = 0
) -> list[Tensor]:
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = align_labels(model, logits, labels_of(batch), batch["attention_mask"])
    likelihood = resolve_likelihood(model, logits, labels, "mean")
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(logits))]
    return example_losses(logits, labels, likelihood, fisher_type, generators)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (bert(), classification_batch()),
        (bert(num_labels=1), regression_batch()),
        (bert(num_labels=2, problem_type="regression"), regression_batch(outputs=2)),
        (bert(), text_batch() | {"labels": torch.eye(4, device=DEVICE)[:, :3]}),  # floats: several labels at once
        (llama(), causal_batch()),
        (llama(), causal_batch(side="left", ignore_padding=False)),
        (llama(), causal_batch(ignore_padding=False, prompt=2)),
        (llama_classifier(), classification_batch(side="left")),
    ],
    ids=["bert", "regression", "two-outputs", "multi-label", "llama", "llama-left", "llama-prompt", "llama-classifier"],
)
def test_losses_are_transformers_losses_of_the_unpadded_example(model: nn.Module, batch: dict[str, Tensor]) -> None:
    (losses,) = losses_of(model, batch)
    alone = torch.stack([model(**row).loss for row in examples(batch)])
    torch.testing.assert_close(losses, alone.detach(), rtol=1e-5, atol=1e-6)


def test_align_labels_counts_real_tokens_that_follow_real_tokens() -> None:
    batch = causal_batch((2, 4), side="left", ignore_padding=False)
    ids = batch["input_ids"]
    labels = align_labels(llama(), torch.zeros(2, 4, 9), batch["labels"], batch["attention_mask"])
    assert labels.tolist() == [[IGNORED, IGNORED, int(ids[0, 3]), IGNORED], [*ids[1, 1:].tolist(), IGNORED]]


def test_align_labels_ignores_virtual_tokens() -> None:
    batch = causal_batch((2, 3))
    labels = align_labels(llama(), torch.zeros(2, 5, 9), batch["labels"], batch["attention_mask"])
    ids = batch["input_ids"].tolist()
    # The last virtual token predicts the first real one, as in PEFT's training loss.
    assert labels.tolist() == [[IGNORED, *ids[0][:2], IGNORED, IGNORED], [IGNORED, *ids[1], IGNORED]]


def test_example_without_a_counted_token_has_no_loss() -> None:
    batch = causal_batch((3, 4))
    batch["labels"][0] = IGNORED
    (losses,) = losses_of(llama(), batch)
    assert losses[0] == 0
    assert losses[1] > 0


def test_drawn_labels_follow_the_model() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0]]).repeat(4000, 1)
    likelihood = resolve_likelihood(bert(), logits, torch.zeros(4000, dtype=torch.long), "mean")
    generators = [torch.Generator().manual_seed(row * 2**20) for row in range(4000)]
    drawn = likelihood.sample(logits, torch.zeros(4000, dtype=torch.long), generators)
    shares = drawn.bincount(minlength=3) / 4000
    torch.testing.assert_close(shares, logits[0].softmax(0), rtol=0, atol=0.03)


def test_drawn_tokens_depend_on_neither_padding_nor_neighbours() -> None:
    model, batch = llama(), causal_batch(prompt=1)
    (together,) = losses_of(model, batch, "sampled", seed=5)
    for number, row in enumerate(examples(batch)):
        (alone,) = losses_of(model, row, "sampled", seed=5 + number)
        torch.testing.assert_close(alone[0], together[number], rtol=1e-5, atol=1e-6)


def test_drawn_labels_leave_ignored_positions() -> None:
    labels = torch.tensor([[IGNORED, 3, IGNORED]])
    likelihood = resolve_likelihood(llama(), torch.zeros(1, 3, 9), labels, "mean")
    drawn = likelihood.sample(torch.zeros(1, 3, 9), labels, [torch.Generator().manual_seed(0)])
    assert drawn[0, 0] == drawn[0, 2] == IGNORED
    assert 0 <= drawn[0, 1] < 9
    assert labels[0, 1] == 3


def test_encoder_decoder_of_equal_widths_keeps_all_its_labels() -> None:
    # The source's padding says nothing about the target's, even where both are equally long.
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    model.eval().to(DEVICE)
    batch = text_batch((3, 4))
    batch = {key: nn.functional.pad(value, (0, 2)) for key, value in batch.items()}
    batch["labels"] = torch.randint(3, 40, batch["input_ids"].shape).to(DEVICE)
    batch["labels"][1, 4:] = IGNORED
    weight = model.lm_head.weight if not model.config.tie_word_embeddings else model.shared.weight
    name = next(name for name, parameter in model.named_parameters() if parameter is weight)
    expected = torch.zeros_like(weight)
    for row in range(2):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        expected += torch.autograd.grad(model(**one).loss, weight)[0] ** 2 / 2
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is weight)
    scores = calculate_fisher_information(model, [batch], progress=False)
    torch.testing.assert_close(scores[name], expected.detach(), rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_labels_under_both_names() -> None:
    ones, twos = torch.ones(2), torch.full((2,), 2.0)
    assert labels_of({"label": ones}) is ones
    assert labels_of({"label": ones, "labels": twos}) is twos
    with pytest.raises(FisherError, match="found: idx"):
        labels_of({"idx": ones})


def test_unknown_task_is_named() -> None:
    model = SimpleNamespace(loss_type="ForObjectDetection")
    with pytest.raises(FisherError, match=r"'ForObjectDetection'.*ForCausalLM.*loss_fn=f"):
        resolve_likelihood(model, torch.zeros(1, 2), torch.zeros(1), "mean")  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("counted", [1, 3, 4, 8])
def test_few_positions_that_count_are_taken_out_and_many_are_not(counted: int, reduction: Any) -> None:
    """The two ways give the same losses and gradients, by the plain formula."""
    torch.manual_seed(0)
    logits = torch.randn(2, 8, 5, requires_grad=True)
    labels = torch.randint(5, (2, 8))
    labels[0, counted:] = IGNORED
    labels[1, : 8 - counted] = IGNORED
    model: Any = SimpleNamespace(loss_type="ForTokenClassification")
    likelihood = resolve_likelihood(model, logits, labels, reduction)
    (losses,) = example_losses(logits, labels, likelihood, "empirical", [])
    expected = torch.stack(
        [
            nn.functional.cross_entropy(row[label != IGNORED], label[label != IGNORED], reduction=reduction)
            for row, label in zip(logits, labels, strict=True)
        ]
    )
    torch.testing.assert_close(losses, expected)
    weights = torch.tensor([1.0, -2.0])
    found, wanted = (torch.autograd.grad((weights * each).sum(), logits)[0] for each in (losses, expected))
    torch.testing.assert_close(found, wanted)
