"""The loss that is scored is the one the model itself computes, or none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from device import DEVICE
from tiny import assert_scores_close, bert, causal_batch, classification_batch, examples, llama, lora
from torch import Tensor, nn
from torch.nn import functional as F

from fish_tuning import FisherError, FishTuningWarning, calculate_fisher_information, start_along_gradient
from fish_tuning.scores.loss_vectors import LossVectors
from fish_tuning.scores.own_loss import OwnLoss

BART = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "init_std": 0.3, "pad_token_id": 0,
}  # fmt: skip
PROPHETNET = {
    "vocab_size": 40, "hidden_size": 16, "num_encoder_layers": 1, "num_decoder_layers": 1, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2, "init_std": 0.3,
}  # fmt: skip
XLM: dict[str, Any] = {"vocab_size": 40, "emb_dim": 16, "n_layers": 1, "n_heads": 2, "pad_index": 0}


def made(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config).eval().to(DEVICE)


def bart() -> Any:
    return made(hf.BartForCausalLM, hf.BartConfig(**BART))


def xlnet() -> Any:
    return made(hf.XLNetLMHeadModel, hf.XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=16))


def xlm() -> Any:
    return made(hf.XLMWithLMHeadModel, hf.XLMConfig(**XLM))


def flaubert() -> Any:
    return made(hf.FlaubertWithLMHeadModel, hf.FlaubertConfig(**XLM))


def by_the_models_loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(p) for name, p in trained.items()}
    rows = list(examples(batch))
    for row in rows:
        gradients = torch.autograd.grad(model(**row).loss, list(trained.values()), allow_unused=True)
        for name, gradient in zip(trained, gradients, strict=True):
            totals[name] += 0 if gradient is None else gradient.square() / len(rows)
    return {name: total.detach() for name, total in totals.items()}


def scored(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    return calculate_fisher_information(model, [batch], warmup_steps=0, progress=False, **options)


@pytest.mark.parametrize("make", [bart, xlnet, xlm, flaubert, llama])
@pytest.mark.parametrize("method", ["auto", "loop"])
def test_scores_are_of_the_loss_that_the_class_computes(make: Callable[[], Any], method: str) -> None:
    model, batch = make(), causal_batch((6, 6, 6), prompt=1)
    assert_scores_close(scored(model, batch, method=method), by_the_models_loss(model, batch))


def test_padding_on_either_side_counts_for_no_label() -> None:
    model = bart()
    batch = causal_batch((5, 3, 4), ignore_padding=False)
    own = torch.stack([model(**row).loss for row in examples(batch)])
    losses = LossVectors(model, "empirical", "mean", None, 0)
    torch.testing.assert_close(losses(batch, 0)[0], own, rtol=1e-5, atol=1e-6)
    left = LossVectors(model, "empirical", "mean", None, 0)
    (found,) = left(causal_batch((5, 3, 4), side="left", ignore_padding=False), 0)
    assert not left.own.open
    assert found.isfinite().all()


def test_drawn_labels_are_of_the_tokens_that_count() -> None:
    batch = causal_batch((6, 6, 6))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    batch["labels"][:, 0] = 999  # which no class is, and no shifted loss would count
    losses = LossVectors(bart(), "sampled", "mean", None, 0)
    assert (losses(batch, 0)[0] > 0).all()
    assert not losses.own.shifted


@pytest.mark.parametrize("kind", ["ProphetNetForCausalLM", "ProphetNetForConditionalGeneration"])
def test_a_loss_of_n_grams_is_refused(kind: str) -> None:
    model = made(getattr(hf, kind), hf.ProphetNetConfig(**PROPHETNET))
    with pytest.raises(
        FisherError, match=rf"{kind} itself gives the first batch a loss of .*not known here.*loss_fn=f"
    ):
        scored(model, causal_batch((6, 6, 6)))


def halved(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.5)


def test_a_loss_function_of_the_users_own_is_refused_by_name() -> None:
    model, batch = llama(), causal_batch((6, 6))
    model.loss_function = halved
    with pytest.raises(FisherError, match=r"by its loss_function \(halved\), and what would be scored is .*loss_fn=f"):
        scored(lora(model), batch)
    assert scored(model, batch, loss_fn=lambda outputs, given: outputs.logits.square().mean((1, 2)))
    del model._loss_function
    model.loss_function = model.loss_function  # the same, under a name of its own
    assert_scores_close(scored(model, batch), by_the_models_loss(model, batch))


class WeightedForSequenceClassification(hf.BertForSequenceClassification):
    def forward(self, labels: Tensor | None = None, **inputs: Any) -> Any:
        outputs = super().forward(**inputs)
        if labels is not None:
            outputs.loss = F.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 2, 3], device=DEVICE))
        return outputs


def test_a_class_with_weights_of_its_own_is_refused() -> None:
    model = made(WeightedForSequenceClassification, bert().config)
    with pytest.raises(FisherError, match="WeightedForSequenceClassification itself gives"):
        scored(model, classification_batch())
    assert scored(model, classification_batch(), fisher_type="sampled")  # whose labels are the model's


def test_routers_are_told_once_and_left_out() -> None:
    config = hf.MixtralConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5,
    )  # fmt: skip
    model, batch = made(hf.MixtralForCausalLM, config), causal_batch((6, 6))
    with pytest.warns(FishTuningWarning, match=r"adds 0\.5 times its routers' balance") as told:
        with_routers = scored(model, batch)
    assert sum("balance" in str(warning.message) for warning in told) == 1
    model.config.output_router_logits = False
    with warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        assert_scores_close(with_routers, scored(model, batch))


def test_routers_of_an_encoder_decoder_are_refused_with_the_way_out() -> None:
    config = hf.NllbMoeConfig(
        **BART, num_experts=4, encoder_sparse_step=1, decoder_sparse_step=1, decoder_start_token_id=0,
        output_router_logits=True, router_aux_loss_coef=0.5,
    )  # fmt: skip
    model = made(hf.NllbMoeForConditionalGeneration, config)
    with pytest.raises(FisherError, match=r"left out by model\.config\.output_router_logits = False"):
        scored(model, causal_batch((6, 6)))
    model.config.output_router_logits = False
    assert scored(model, causal_batch((6, 6)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_tell_losses_apart(dtype: torch.dtype) -> None:
    losses = LossVectors(bart().to(dtype), "empirical", "mean", None, 0)
    losses(causal_batch((6, 6, 6)), 0)
    assert not losses.own.shifted
    assert not losses.own.open


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_a_loss_that_is_taken_in_sixteen_bits_is_no_other_one(scale: float, dtype: torch.dtype) -> None:
    generator, model = torch.Generator().manual_seed(0), bert().to(dtype)
    for size in (2, 8, 32) * 20:
        logits = (torch.randn(size, 3, generator=generator) * scale).to(DEVICE, dtype)
        labels = torch.where(torch.rand(size, generator=generator).to(DEVICE) < 0.2, 0, logits.argmax(1))
        outputs = {"loss": F.cross_entropy(logits, labels), "logits": logits}
        own = OwnLoss(model)
        own.look(outputs, logits, {"labels": labels}, drawn=False)
        assert not own.open


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_autocast_gives_a_loss_in_fp32_of_log_probabilities_in_sixteen_bits(dtype: torch.dtype) -> None:
    """As CUDA's does; without one such a loss is another than the one scored."""
    generator, refused = torch.Generator().manual_seed(0), 0
    for size in (2, 8, 32) * 20:
        logits = torch.randn(size, 3, generator=generator).to(DEVICE, dtype)
        labels = logits.argmax(1)
        loss = F.nll_loss(F.log_softmax(logits, 1, dtype=dtype).float(), labels)
        own = OwnLoss(bert())
        with torch.autocast(DEVICE.type, dtype):
            own.look({"loss": loss, "logits": logits}, logits, {"labels": labels}, drawn=False)
        assert not own.open
        own = OwnLoss(bert())
        try:
            own.look({"loss": loss, "logits": logits}, logits, {"labels": labels}, drawn=False)
        except FisherError:
            refused += 1
    assert refused > 30


def test_losses_that_are_the_same_tell_nothing() -> None:
    model = bart()
    nn.init.zeros_(model.lm_head.weight)  # each token is as likely as any
    with pytest.raises(FisherError, match="which both known losses are but for rounding"):
        scored(model, causal_batch((6, 6)))


def test_labels_that_the_model_takes_no_loss_of_are_told() -> None:
    """By the checks of labels, else by the model's own error."""
    with pytest.raises(FisherError, match="needs one class number an example"):
        scored(bert(problem_type="single_label_classification"), classification_batch() | {"labels": torch.rand(4)})
    model = bart()
    model.forward = lambda labels=None, **inputs: labels[99] if labels is not None else bart()(**inputs)
    with pytest.raises(
        FisherError, match=r"BartForCausalLM could not compute a loss of these labels \(IndexError: .*loss_fn"
    ):
        LossVectors(model, "empirical", "mean", None, 0)(causal_batch((6, 6)), 0)


def test_no_model_that_hands_its_labels_to_transformers_is_given_them_twice() -> None:
    """A second loss of all tokens takes time and memory."""
    model = llama()
    assert not OwnLoss(lora(model)).open
    assert OwnLoss(lora(bert())).open
    model.forward = lambda **inputs: None  # type: ignore[method-assign]
    assert OwnLoss(model).open


def test_the_configuration_is_left_as_it_was() -> None:
    model = bert()
    scored(model, classification_batch())
    assert model.config.problem_type is None


def test_a_start_along_the_gradient_is_that_of_the_models_loss() -> None:
    model = llama()
    model.loss_function = halved
    with pytest.raises(FisherError, match=r"by its loss_function \(halved\)"):
        start_along_gradient(lora(model, init_lora_weights=True), [causal_batch((6, 6))], progress=False)
