"""The scores: batched rules, the per-example loop and an independent definition agree."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from device import DEVICE
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny import (
    Batch,
    assert_scores_close,
    bert,
    causal_batch,
    classification_batch,
    examples,
    image_batch,
    llama,
    llama_classifier,
    lora,
    only_trainable,
    rebatch,
    reference_fisher,
    regression_batch,
    text_batch,
    vit,
)
from torch import Tensor, nn

import fish_tuning.scores.moments as moments_module
from fish_tuning import FisherError, apply_mask, calculate_fisher_information
from fish_tuning.scores.layer_rules import Gradients
from fish_tuning.scores.scorer import Scorer

# That a rule failed is what some of the tests are about; those that are about the warning ask for it.
pytestmark = pytest.mark.filterwarnings("ignore::fish_tuning.FishTuningWarning")


def scored(model: nn.Module, loader: Batch | list[Batch], **kwargs: object) -> dict[str, Tensor]:
    batches = [loader] if isinstance(loader, dict) else loader
    return calculate_fisher_information(model, batches, progress=False, **kwargs)  # type: ignore[arg-type]


def looped_names(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(message for message in caplog.messages if "by the loop" in message)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "bert": (lambda: lora(bert()), classification_batch),
    "bert-regression": (lambda: lora(bert(num_labels=1)), regression_batch),
    "bert-two-outputs": (
        lambda: lora(bert(num_labels=2, problem_type="regression")),
        lambda: regression_batch(outputs=2),
    ),
    "bert-multi-label": (
        lambda: lora(bert(problem_type="multi_label_classification")),
        lambda: text_batch() | {"labels": torch.eye(4, device=DEVICE)[:, :3]},
    ),
    "llama-sdpa-right": (lambda: lora(llama(attn_implementation="sdpa")), causal_batch),
    "llama-sdpa-left": (lambda: lora(llama(attn_implementation="sdpa")), lambda: causal_batch(side="left")),
    "llama-eager-right": (lambda: lora(llama(attn_implementation="eager")), causal_batch),
    "llama-eager-left": (lambda: lora(llama(attn_implementation="eager")), lambda: causal_batch(side="left")),
    "llama-prompt-ignored": (lambda: lora(llama()), lambda: causal_batch(prompt=2)),
    "llama-labels-are-ids-right": (lambda: lora(llama()), lambda: causal_batch(ignore_padding=False)),
    "llama-labels-are-ids-left": (lambda: lora(llama()), lambda: causal_batch(side="left", ignore_padding=False)),
    "llama-classifier-right": (lambda: lora(llama_classifier()), classification_batch),
    "llama-classifier-left": (lambda: lora(llama_classifier()), lambda: classification_batch(side="left")),
    "vit": (lambda: lora(vit()), image_batch),
}


@pytest.mark.parametrize("case", CASES)
def test_batched_and_loop_equal_the_definition(case: str, caplog: pytest.LogCaptureFixture) -> None:
    make_model, make_batch = CASES[case]
    model, batch = make_model(), make_batch()
    reference = reference_fisher(model, batch)
    assert all(tensor.any() for tensor in reference.values())  # otherwise there would be nothing to compare
    with caplog.at_level(logging.INFO, "fish_tuning"):
        assert_scores_close(scored(model, batch), reference)
    assert not looped_names(caplog), "LoRA factors and heads have rules"
    assert_scores_close(scored(model, batch, method="loop"), reference)


@pytest.mark.parametrize("fisher_type", ["empirical", "sampled", "expected"])
@pytest.mark.parametrize("case", ["bert", "bert-regression", "bert-two-outputs", "llama-classifier-left", "vit"])
def test_scores_do_not_depend_on_batch_size_of_classifiers(case: str, fisher_type: str) -> None:
    make_model, make_batch = CASES[case]
    model, batch = make_model(), make_batch()
    reference = scored(model, rebatch(batch, 1), method="loop", fisher_type=fisher_type)
    for size in (1, 3, 4):  # one by one, with a ragged last batch, all at once
        assert_scores_close(scored(model, rebatch(batch, size), fisher_type=fisher_type), reference)


@pytest.mark.parametrize("fisher_type", ["empirical", "sampled"])
@pytest.mark.parametrize("token_reduction", ["mean", "sum"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_do_not_depend_on_batch_size_of_causal_models(fisher_type: str, token_reduction: str, side: str) -> None:
    model, batch = lora(llama()), causal_batch(side=side, prompt=1)
    settings = {"fisher_type": fisher_type, "token_reduction": token_reduction}
    reference = scored(model, list(examples(batch)), method="loop", **settings)
    for size in (1, 3, 4):
        assert_scores_close(scored(model, rebatch(batch, size), **settings), reference)


def test_token_sum_weighs_long_examples_more() -> None:
    model, batch = lora(llama()), causal_batch()
    assert_scores_close(scored(model, batch, token_reduction="sum"), reference_fisher(model, batch, "sum"))


def test_padding_at_the_end_of_all_rows_changes_nothing() -> None:
    model, batch = lora(llama()), causal_batch(ignore_padding=False)
    wider = {key: nn.functional.pad(value, (0, 6)) for key, value in batch.items()}
    assert_scores_close(scored(model, wider), scored(model, batch), tolerance=1e-6)


def test_expected_is_the_sum_over_all_classes() -> None:
    model, batch = lora(bert()), classification_batch()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for row in examples(batch):
        log_p = model(**row).logits[0].log_softmax(-1)
        for label in range(3):
            gradients = torch.autograd.grad(log_p[label], list(parameters.values()), retain_graph=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                expected[name] += log_p[label].exp().detach() * gradient**2 / 4
    assert_scores_close(scored(model, batch, fisher_type="expected"), expected)


def test_expected_needs_no_true_labels() -> None:
    model, batch = lora(bert()), classification_batch()
    others = batch | {"labels": batch["labels"].flip(0)}
    one, other = (scored(model, b, fisher_type="expected") for b in (batch, others))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", ["bert", "bert-regression", "bert-two-outputs"])
def test_sampled_approaches_expected(case: str) -> None:
    make_model, make_batch = CASES[case]
    model, batch = make_model(), make_batch()
    often = [{key: value.repeat(500, *[1] * (value.dim() - 1)) for key, value in batch.items()}]
    total = {n: float(s.sum()) for n, s in scored(model, often, fisher_type="sampled").items()}
    exact = {n: float(s.sum()) for n, s in scored(model, batch, fisher_type="expected").items()}
    assert total == pytest.approx(exact, rel=0.15)


def test_sampled_depends_on_the_seed_alone() -> None:
    model, batch = lora(llama()), causal_batch()
    one, again, other = (scored(model, batch, fisher_type="sampled", seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_same_input_same_bits() -> None:
    model, batch = lora(bert()), classification_batch()
    one, again = scored(model, rebatch(batch, 3)), scored(model, rebatch(batch, 3))
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_num_samples_cuts_the_last_batch() -> None:
    model, batch = lora(bert()), classification_batch()
    first_three = {key: value[:3] for key, value in batch.items()}
    assert_scores_close(scored(model, rebatch(batch, 2), num_samples=3), reference_fisher(model, first_three))


def test_num_samples_beyond_the_loader_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = lora(bert()), classification_batch()
    assert_scores_close(scored(model, batch, num_samples=9), reference_fisher(model, batch))
    assert "9 examples asked for, the loader gave 4" in caplog.text


# Full fine-tuning: every kind of tensor


def test_all_tensors_of_bert(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = bert(), classification_batch((5, 9, 3, 7, 6))
    batch["token_type_ids"] = (torch.arange(9) > 2).long().repeat(5, 1)
    reference = reference_fisher(model, batch)
    with caplog.at_level(logging.INFO, "fish_tuning"):
        assert_scores_close(scored(model, rebatch(batch, 3)), reference)
    assert not looped_names(caplog), "the one row of position ids is expanded to a row an example"
    assert_scores_close(scored(model, batch, method="loop"), reference)


@pytest.mark.parametrize("tied", [False, True])
def test_all_tensors_of_llama(tied: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = llama(tie_word_embeddings=tied, attention_bias=True), causal_batch()
    reference = reference_fisher(model, batch)
    assert ("lm_head.weight" in reference) is not tied
    with caplog.at_level(logging.INFO, "fish_tuning"):
        assert_scores_close(scored(model, rebatch(batch, 3)), reference)
    assert not looped_names(caplog)


def test_all_tensors_of_vit() -> None:
    model, batch = vit(), image_batch()
    assert_scores_close(scored(model, rebatch(batch, 3)), reference_fisher(model, batch))


SMALL = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "pad_token_id": 0}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_token_classification(family: str, side: str, caplog: pytest.LogCaptureFixture) -> None:
    # RoBERTa counts positions from padding_idx + 1, read off the ids; BERT from 0, whatever the padding.
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **SMALL, num_hidden_layers=1, max_position_embeddings=32, initializer_range=0.3, num_labels=3
    )
    model = getattr(transformers, f"{family}ForTokenClassification")(config).eval()
    only_trainable(model, [name for name, _ in model.named_parameters() if "query" in name or "classifier" in name])
    batch = text_batch(side=side)
    labels = torch.randint(0, 3, batch["input_ids"].shape).to(DEVICE)
    labels[:, -1] = -100
    batch["labels"] = labels.masked_fill(batch["attention_mask"] == 0, -100)
    with caplog.at_level(logging.INFO, "fish_tuning"):
        assert_scores_close(scored(model, rebatch(batch, 3)), reference_fisher(model, batch))
    assert not looped_names(caplog)


def test_head_that_reads_padding_goes_to_the_loop() -> None:
    # BERT's head reads the first column, which is padding in a left-padded row: only a row alone is scored right.
    model, batch = lora(bert()), classification_batch(side="left")
    assert_scores_close(scored(model, batch, method="loop"), reference_fisher(model, batch))
    assert_scores_close(scored(model, batch), reference_fisher(model, batch))


# What no rule covers


class Toy(nn.Module):
    """A classifier on vectors, whose middle is given; `loss_type` is what transformers calls its task."""

    loss_type = "ForSequenceClassification"

    def __init__(self, middle: nn.Module, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.head = nn.Linear(width, width), middle, nn.Linear(width, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> object:
        hidden = self.middle(self.first(x))
        logits = self.head(hidden.mean(1) if hidden.dim() == 3 else hidden)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return type("Output", (), {"logits": logits, "loss": loss})()


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())  # type: ignore[no-any-return]


class UsedOutside(nn.Module):
    """The weight is used once more beside its layer's forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.layer.weight * 0.5


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).tanh().transpose(0, 1)  # type: ignore[no-any-return]


class Mixes(nn.Module):
    """Batch normalisation by hand: the examples of a batch are not apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)).tanh().view_as(x)  # type: ignore[no-any-return]


def vectors(number: int = 5, positions: int = 4) -> Batch:
    x = torch.randn(number, positions, 6, generator=torch.Generator().manual_seed(3))
    return {"x": x, "labels": torch.arange(number) % 3}


class OnTokens(nn.Module):
    """A tiny causal model with a weight that is also used beside its layer."""

    loss_type = "ForCausalLM"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.middle, self.head = nn.Embedding(9, 6), UsedOutside(), nn.Linear(6, 9)

    def forward(self, input_ids: Tensor, **_: Tensor) -> object:
        return type("Output", (), {"logits": self.head(self.middle(self.embed(input_ids)))})()


def weighted_loss(outputs: Any, batch: Batch) -> Tensor:
    losses = nn.functional.cross_entropy(outputs.logits.transpose(1, 2), batch["input_ids"], reduction="none")
    return losses.mean(1) * batch["weights"]


@pytest.mark.parametrize("silent", [1, 2, 5], ids=["shortest row", "whole first batch", "all but the last row"])
def test_an_example_without_gradient_proves_no_rule(silent: int) -> None:
    ids = torch.randint(9, (6, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 2:] = 0
    loader = rebatch(
        {"input_ids": ids, "attention_mask": mask, "labels": ids, "weights": (torch.arange(6) >= silent).float()}, 2
    )
    model = OnTokens()
    by_loop = scored(model, loader, method="loop", loss_fn=weighted_loss)
    assert_scores_close(scored(model, loader, loss_fn=weighted_loss), by_loop)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize(
    "middle",
    [
        lambda: Twice(nn.Linear(6, 6)),
        lambda: Twice(nn.LayerNorm(6)),
        lambda: nn.RMSNorm(6),
        lambda: nn.LayerNorm((4, 6)),
        UsedOutside,
        SequenceFirst,
        Mixes,
        lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True)),
        lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(6, 6)),
        lambda: nn.Conv1d(4, 4, 3, padding=1),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
    ],
    ids=[
        "twice",
        "twice-norm",
        "rms-norm",
        "norm-2d",
        "outside",
        "sequence-first",
        "flat",
        "in-place",
        "batch-norm",
        "conv",
        "weight-norm",
    ],
)
def test_odd_layers(middle: Callable[[], nn.Module], size: int, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(1)
    model = Toy(middle()).eval()
    batch = vectors()
    with caplog.at_level(logging.INFO, "fish_tuning"):
        assert_scores_close(scored(model, rebatch(batch, size)), reference_fisher(model, batch))
    assert not looped_names(caplog)


def test_sequence_first_with_as_many_positions_as_examples() -> None:
    # The shapes alone do not show that the first dimension is not the batch.
    model, batch = Toy(SequenceFirst()), vectors(4, 4)
    assert_scores_close(scored(model, batch), reference_fisher(model, batch))


class Experts(nn.Module):
    """Tokens are routed by the sign of their first entry: how many rows an expert sees depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 6)
        chosen = flat[:, 0] > 0
        out = torch.zeros_like(flat)
        for expert, rows in ((self.one, chosen), (self.two, ~chosen)):
            if rows.any():
                out[rows] = expert(flat[rows])
        return out.view_as(x)


def test_routed_experts_go_to_the_loop() -> None:
    torch.manual_seed(1)
    model, batch = Toy(Experts()), vectors()
    assert_scores_close(scored(model, rebatch(batch, 2)), reference_fisher(model, batch))


def test_layer_first_called_in_a_later_batch_is_never_silently_wrong() -> None:
    torch.manual_seed(1)
    model = Toy(Experts())
    model.first = nn.Identity()
    sleeping, awake = vectors(2), vectors(2)
    sleeping["x"][..., 0] = -1.0
    awake["x"][..., 0] = -1.0
    awake["x"][0, :2, 0] = 1.0  # as many tokens as the batch has examples, all of one example
    both = {key: torch.cat([sleeping[key], awake[key]]) for key in sleeping}
    assert_scores_close(scored(model, [sleeping, awake]), reference_fisher(model, both))
    late = [*[sleeping] * 6, awake]
    everything = {key: torch.cat([batch[key] for batch in late]) for key in sleeping}
    assert_scores_close(scored(model, late), reference_fisher(model, everything))


def test_a_module_is_done_again_for_a_layer_that_is_called_differently_later_and_proven_anew(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Moody(SequenceFirst):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.shape[0] == 3 else self.layer(x).tanh()  # type: ignore[no-any-return]

    model, loader = Toy(Moody()), [vectors(2), vectors(3, 4), vectors(2)]
    by_loop = scored(model, loader, method="loop")
    checked: list[list[str]] = []
    add_checked = Scorer._add_checked

    def noted(self: Scorer, batch: Any, first_example: int, names: list[str], look: list[int]) -> dict[str, str]:
        checked.append(sorted(names))
        return add_checked(self, batch, first_example, names, look)

    monkeypatch.setattr(Scorer, "_add_checked", noted)
    with caplog.at_level("INFO", logger="fish_tuning.scores.fisher"):
        assert_scores_close(scored(model, loader), by_loop)
    assert "middle.layer.weight: it was called with first dimension" in caplog.text
    assert checked[1:] == [["middle.layer.bias", "middle.layer.weight"]]  # in the third batch, what was moved alone


def test_unused_tensor_scores_zero() -> None:
    model = Toy(nn.Tanh())
    model.spare = nn.Linear(2, 2)
    scores = scored(model, vectors())
    assert not scores["spare.weight"].any()
    assert scores["first.weight"].any()


def test_rule_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = bert(), classification_batch()
    whole = scored(model, batch)
    monkeypatch.setattr("fish_tuning.scores.example_gradients.CHUNK_ENTRIES", 700)
    assert_scores_close(scored(model, batch), whole, tolerance=1e-6)


# PEFT methods


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], use_dora=True, init_lora_weights=False),
        LoraConfig(task_type="SEQ_CLS", r=16, target_modules=["query"], use_dora=True, init_lora_weights=False),
        LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "word_embeddings"], init_lora_weights=False),
        IA3Config(task_type="SEQ_CLS", target_modules=["key", "value", "dense"], feedforward_modules=["dense"]),
        PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
        PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    ],
    ids=["dora", "dora-rank-is-width", "lora-embedding", "ia3", "prefix", "prompt"],
)
def test_peft_methods_on_bert(config: PeftConfig, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, batch = get_peft_model(bert(), config), classification_batch()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # away from a start at zero or one
                parameter += 0.1 * torch.randn(parameter.shape).to(parameter.device)
    with caplog.at_level(logging.INFO, "fish_tuning"):
        assert_scores_close(scored(model, rebatch(batch, 3)), reference_fisher(model, batch))
    assert not looped_names(caplog)
    assert len(looped_names(caplog).splitlines()) <= 1


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig], ids=["prefix", "prompt"])
def test_virtual_tokens_on_llama(config: Callable[..., object], side: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))  # type: ignore[arg-type]
    batch = causal_batch(ignore_padding=False, side=side)
    assert_scores_close(scored(model, rebatch(batch, 3)), reference_fisher(model, batch))


def test_modules_to_save_are_scored() -> None:
    model, batch = lora(vit()), image_batch()
    scores = scored(model, batch)
    assert any("modules_to_save" in name and score.any() for name, score in scores.items())
    assert scores.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


# Low precision and activation checkpointing


def test_bf16_weights_score_in_fp32() -> None:
    exact = lora(bert())
    model = lora(bert()).to(torch.bfloat16)
    batch = classification_batch()
    batched, loop = scored(model, batch), scored(model, batch, method="loop")
    assert all(score.dtype == torch.float32 for score in batched.values())
    assert_scores_close(batched, loop, tolerance=0.1)
    assert_scores_close(batched, scored(exact, batch), tolerance=0.3)


def test_small_gradients_do_not_underflow_under_fp16_weights() -> None:
    model = Toy(nn.Tanh()).half()
    batch = vectors() | {"x": vectors()["x"].half() * 1e-3}
    exact = scored(Toy(nn.Tanh()), batch | {"x": batch["x"].float()})
    assert 0 < float(exact["first.weight"].max()) < 6e-8  # below fp16's smallest number
    assert_scores_close(scored(model, batch), exact, tolerance=0.1)


def test_autocast(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = lora(bert()), classification_batch()
    exact = scored(model, batch)
    with torch.autocast(DEVICE.type, torch.bfloat16), caplog.at_level(logging.INFO, "fish_tuning"):
        batched = scored(model, rebatch(batch, 3))
        assert not looped_names(caplog)
        loop = scored(model, batch, method="loop")
    assert any(not torch.equal(batched[name], exact[name]) for name in exact)
    assert_scores_close(batched, loop, tolerance=0.1)
    assert_scores_close(batched, exact, tolerance=0.3)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("method", ["auto", "loop"])
@pytest.mark.parametrize(
    ("make_model", "batch", "fisher_type"),
    [
        (lambda: lora(bert()), classification_batch(), "empirical"),
        (lambda: lora(bert()), classification_batch(), "expected"),
        (lambda: lora(llama()), causal_batch(side="left"), "sampled"),
        (lambda: llama(), causal_batch(), "empirical"),
        (lambda: lora(vit()), image_batch(), "empirical"),
    ],
    ids=["bert", "bert-expected", "llama", "llama-full", "vit"],
)
def test_activation_checkpointing(
    make_model: Callable[[], nn.Module], batch: Batch, fisher_type: str, method: str, use_reentrant: bool
) -> None:
    reference = scored(make_model(), rebatch(batch, 3), fisher_type=fisher_type)
    model = make_model().train()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})  # type: ignore[operator]
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    inner = next(m for name, m in model.named_modules() if name.endswith((".layer.0.attention", "s.0.attention",
                                                                          "s.0.self_attn")))  # fmt: skip
    calls = []
    handle = inner.register_forward_pre_hook(lambda *_: calls.append(torch._C._current_graph_task_id() != -1))
    scores = scored(model, rebatch(batch, 3), fisher_type=fisher_type, method=method)
    handle.remove()
    assert True in calls, "no layer was recomputed in the backward pass"
    assert layers
    assert all(module.training for module in layers)
    assert_scores_close(scores, reference)


# Errors


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.layer(x.mean(1))  # type: ignore[no-any-return]


def test_unknown_task_needs_loss_fn() -> None:
    torch.manual_seed(0)
    model, batch = Unknown(), vectors()

    def distance(outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs.sum(-1) - batch["labels"]).abs()

    with pytest.raises((FisherError, AttributeError), match=r"loss_fn|logits"):
        scored(model, batch)
    scores = scored(model, rebatch(batch, 3), loss_fn=distance)
    expected = torch.zeros_like(model.layer.weight)
    for row in rebatch(batch, 1):
        loss = distance(model(**row), row).sum()
        expected += torch.autograd.grad(loss, model.layer.weight)[0] ** 2 / 5
    assert_scores_close({"w": scores["layer.weight"]}, {"w": expected})


def test_loss_fn_must_give_one_loss_an_example() -> None:
    with pytest.raises(FisherError, match=r"shape \(n,\) for a batch of n; for 1 examples it returned \(\)"):
        scored(Unknown(), vectors(), loss_fn=lambda outputs, batch: outputs.sum())


def test_loss_fn_is_for_given_labels() -> None:
    with pytest.raises(FisherError, match="'sampled'"):
        scored(Unknown(), vectors(), loss_fn=lambda outputs, batch: outputs.sum(-1), fisher_type="sampled")


def test_nothing_trainable() -> None:
    model = bert().requires_grad_(False)
    with pytest.raises(FisherError, match="no trainable tensor"):
        scored(model, classification_batch())


@pytest.mark.parametrize("kwargs", [{"num_samples": 0}, {"num_samples": -1}])
def test_num_samples_must_be_positive(kwargs: dict[str, int]) -> None:
    with pytest.raises(FisherError, match="num_samples"):
        scored(bert(), classification_batch(), **kwargs)


@pytest.mark.parametrize("argument", ["fisher_type", "token_reduction", "method"])
def test_unknown_choices_name_the_allowed_ones(argument: str) -> None:
    with pytest.raises(FisherError, match=f"{argument}='nonsense' is not known; allowed are '"):
        scored(bert(), classification_batch(), **{argument: "nonsense"})


def test_model_must_be_a_module() -> None:
    with pytest.raises(FisherError, match=r"must be a torch\.nn\.Module, not dict"):
        scored({}, classification_batch())  # type: ignore[arg-type]


def test_empty_loader() -> None:
    with pytest.raises(FisherError, match="no example"):
        scored(bert(), [])


def test_missing_labels() -> None:
    with pytest.raises(FisherError, match=r"no 'labels' tensor \(found: input_ids, attention_mask\)"):
        scored(lora(bert()), text_batch())


def test_loss_that_is_not_finite_names_the_example() -> None:
    model, batch = lora(bert(num_labels=1)), regression_batch()
    batch["labels"][3] = float("nan")
    with pytest.raises(FisherError, match="example 3 is not finite"):
        scored(model, rebatch(batch, 2))


def test_expected_refuses_token_wise_tasks() -> None:
    with pytest.raises(FisherError, match="fisher_type='sampled'"):
        scored(lora(llama()), causal_batch(), fisher_type="expected")


def test_masked_model_cannot_be_scored() -> None:
    model = lora(bert())
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    half = torch.zeros_like(parameter, dtype=torch.bool)
    half[0] = True
    apply_mask(model, {name: half})
    with pytest.raises(FisherError, match="remove_mask"):
        scored(model, classification_batch())


def test_device_moves_the_model() -> None:
    model = lora(bert())
    scores = scored(model, classification_batch(), device="cpu")
    assert all(score.device.type == "cpu" for score in scores.values())
    assert {name: score.shape for name, score in scores.items()} == {
        name: p.shape for name, p in model.named_parameters() if p.requires_grad
    }


def test_wrong_rule_is_found_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import fish_tuning.scores.layer_rules as per_example

    def wrong(module: nn.Module, x: Tensor, g: Tensor) -> Gradients:
        return per_example._linear(module, 1.01 * x, g)

    monkeypatch.setitem(per_example._RULES, nn.Linear, replace(per_example._RULES[nn.Linear], gradients=wrong))
    model, batch = lora(bert()), classification_batch()
    with caplog.at_level(logging.INFO, moments_module.logger.name):
        assert_scores_close(scored(model, rebatch(batch, 3)), reference_fisher(model, batch))
    assert "does not agree with the plain gradient" in caplog.text
    assert not looped_names(caplog)


def test_gpt2_and_its_transposed_layers(caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, num_labels=3)
    torch.manual_seed(0)
    model, batch = transformers.GPT2LMHeadModel(config).eval(), causal_batch()
    with caplog.at_level(logging.INFO, "fish_tuning"):
        assert_scores_close(scored(model, batch), reference_fisher(model, batch))
    assert not looped_names(caplog), "what the head shares with the embeddings is watched in both"


def test_lora_on_convolutions(caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    torch.manual_seed(0)
    base = transformers.ResNetForImageClassification(config)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["convolution"], init_lora_weights=False))
    batch = image_batch()
    reference = reference_fisher(model, batch)
    with caplog.at_level(logging.INFO, "fish_tuning"):
        assert_scores_close(scored(model, batch), reference)
    assert not looped_names(caplog)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_on_quantised_base_weights(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("bitsandbytes", reason="base weights in 4 bits need bitsandbytes")
    llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    quantisation = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantisation, dtype=torch.float32
    )
    targets = ["k_proj", "v_proj", "down_proj"]
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=["down_proj"])
    model = get_peft_model(base, ia3) if kind == "ia3" else lora(base, use_dora=kind == "dora")
    with caplog.at_level(logging.INFO, "fish_tuning"):
        scores = scored(model, rebatch(causal_batch(), 3))
    assert not looped_names(caplog)
    rounding = 1e-5 if DEVICE.type == "cpu" else 1e-4  # of products with 4-bit weights
    assert_scores_close(scores, scored(model, causal_batch(), method="loop"), rounding)


def test_on_eight_bits_to_the_rounding_of_activations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The forward pass itself rounds activations to 8 bits, a little differently in a batch than alone."""
    pytest.importorskip("bitsandbytes", reason="base weights in 8 bits need bitsandbytes")
    llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    base = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32
    )
    model = lora(base)
    with caplog.at_level(logging.INFO, "fish_tuning"):
        scores = scored(model, causal_batch())
    assert not looped_names(caplog)
    assert_scores_close(scores, scored(model, causal_batch(), method="loop"), tolerance=0.2)


def test_dtype_and_place_of_the_scores() -> None:
    model, batch = lora(bert()), classification_batch()
    reference = scored(model, rebatch(batch, 2))
    coarse = scored(model, rebatch(batch, 2), scores_dtype=torch.bfloat16, scores_device="cpu")
    assert {score.dtype for score in coarse.values()} == {torch.bfloat16}
    assert_scores_close({name: score.float() for name, score in coarse.items()}, reference, tolerance=2**-6)
    with pytest.raises(FisherError, match=r"float16 cannot hold squared gradients.*bfloat16"):
        scored(model, batch, scores_dtype=torch.float16)


@pytest.mark.parametrize("method", ["auto", "loop"])
def test_gradients_come_one_at_a_time_and_past_the_users_hooks(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins: list[Tensor] = []
    most = 0
    register = Tensor.register_post_accumulate_grad_hook

    def watched(stand_in: Tensor, hook: Callable[[Tensor], None]) -> object:
        def counting(tensor: Tensor) -> None:
            nonlocal most
            most = max(most, sum(other.grad is not None for other in stand_ins))
            hook(tensor)

        stand_ins.append(stand_in)
        return register(stand_in, counting)

    model, called = bert(), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(called.append)
    monkeypatch.setattr(Tensor, "register_post_accumulate_grad_hook", watched)
    scored(model, classification_batch(), method=method)
    assert len(stand_ins) >= len(list(model.parameters()))
    assert most == 1
    assert not called


class Shared(nn.Module):
    """A module that is registered under two names, and a tensor that is read past its attribute."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.bank = nn.ParameterDict({"bank": nn.Parameter(torch.randn(3))})
        self.again = self.bank
        self.past = (self.bank["bank"],) if hidden else ()

    def forward(self, input_ids: Tensor) -> Tensor:
        weight = self.past[0] if self.past else self.bank["bank"] + self.again["bank"]
        return (input_ids.float() * weight).sum(1)


def test_a_module_registered_twice_is_left_as_it_was() -> None:
    model, batch = Shared(hidden=False), {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    before = model.bank["bank"]
    scores = scored(model, batch, loss_fn=lambda outputs, batch: outputs)
    assert model.bank["bank"] is before
    assert isinstance(model.again["bank"], nn.Parameter)
    torch.testing.assert_close(scores["bank.bank"], 4 * batch["input_ids"].float().square().mean(0))


def test_a_tensor_that_is_read_past_its_attribute_is_refused() -> None:
    batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    with pytest.raises(FisherError, match=r"'bank\.bank' cannot be scored: its layer keeps a reference"):
        scored(Shared(hidden=True), batch, loss_fn=lambda outputs, batch: outputs)
