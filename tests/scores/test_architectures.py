"""Whole models of many families: every tensor scored in batches, and as one example at a time gives it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from tiny import assert_scores_close
from torch import Tensor, nn

from fish_tuning import FishTuningWarning, calculate_fisher_information

TEXT = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "pad_token_id": 0,
}  # fmt: skip
IMAGE = {"image_size": 32, "num_labels": 2}
T5 = {
    "vocab_size": 60,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": 60, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0,
    "decoder_start_token_id": 0, "max_position_embeddings": 512,
}  # fmt: skip


def tokens(generator: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(5, 60, (4, 7), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def classes(generator: torch.Generator) -> dict[str, Tensor]:
    return tokens(generator) | {"labels": torch.arange(4) % 2}


def pairs(generator: torch.Generator) -> dict[str, Tensor]:
    return tokens(generator) | {"labels": torch.randint(5, 60, (4, 5), generator=generator)}


def images(generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, 3, 32, 32, generator=generator), "labels": torch.arange(4) % 2}


def sounds(generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_values": torch.randn(4, 400, generator=generator), "labels": torch.arange(4) % 2}


CASES: dict[str, tuple[Callable[[], Any], Callable[[torch.Generator], dict[str, Tensor]]]] = {
    "opt": (  # feed-forward layers on all tokens of the batch
        lambda: hf.OPTForCausalLM(hf.OPTConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=2, ffn_dim=24, num_attention_heads=2,
            max_position_embeddings=32, word_embed_proj_dim=16, pad_token_id=1)), tokens),
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), pairs),  # relative positions, tied tables
    "bart": (  # a tied table whose rows are scaled, positions that it counts itself
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART, scale_embedding=True)), pairs),
    "gemma": (  # the same with a scale that is rounded to the weights' precision
        lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**TEXT, num_key_value_heads=1, head_dim=8)), tokens),
    "biogpt": (  # one row of positions for all
        lambda: hf.BioGptForCausalLM(hf.BioGptConfig(**TEXT, max_position_embeddings=32)), tokens),
    "masked bert": (  # its head has the bias of the layer in it
        lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)), tokens),
    "mixtral": (  # experts in one tensor
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, num_key_value_heads=1, num_local_experts=4)), tokens),
    "switch": (  # experts as modules
        lambda: hf.SwitchTransformersForConditionalGeneration(hf.SwitchTransformersConfig(
            **T5, num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)), pairs),
    "deberta": (
        lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(
            **TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=4, max_relative_positions=16,
            share_att_key=True)), classes),
    "swin": (
        lambda: hf.SwinForImageClassification(hf.SwinConfig(
            **IMAGE, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4)), images),
    "convnext": (  # norms over channels that come first
        lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(
            hidden_sizes=[8] * 2, depths=[1] * 2, num_labels=2, num_stages=2, layer_scale_init_value=0.5)), images),
    "wav2vec2": (  # 1-D convolutions, one of them with weight norm
        lambda: hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(
            **TEXT, conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8), num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2, feat_extract_norm="layer", mask_time_prob=0.0)), sounds),
    "bloom": (
        lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2)), tokens),
    "clip": (
        lambda: hf.CLIPForImageClassification(hf.CLIPConfig(
            vision_config={**TEXT, "image_size": 32, "patch_size": 8}, text_config=TEXT)), images),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_looped(case: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    make_model, make_batch = CASES[case]
    model: nn.Module = make_model().eval()
    generator = torch.Generator().manual_seed(0)
    # What is found out in one batch counts from the next one on.
    batches = [make_batch(generator) for _ in range(3)]
    with caplog.at_level(logging.INFO, "fish_tuning"), warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        scores = calculate_fisher_information(model, batches, progress=False)
    looped = [line for line in caplog.text.splitlines() if "by the loop" in line and "masked_spec_embed" not in line]
    assert not looped
    by_loop = calculate_fisher_information(model, batches, method="loop", progress=False)
    largest = max(float(scores.norm()) for scores in by_loop.values())
    told = [name for name, scores in by_loop.items() if float(scores.norm()) > 1e-8 * largest]  # others are rounding
    assert len(told) > len(by_loop) / 2
    assert_scores_close({name: scores[name] for name in told}, {name: by_loop[name] for name in told}, 1e-4)


@pytest.mark.parametrize(("case", "tables"), [("opt", 1), ("bart", 2), ("biogpt", 1)])
def test_tables_of_positions_are_looked_up_again_and_no_module_around_them(
    case: str, tables: int, caplog: pytest.LogCaptureFixture
) -> None:
    make_model, make_batch = CASES[case]
    with caplog.at_level(logging.INFO, "fish_tuning"):
        batch = make_batch(torch.Generator().manual_seed(0))
        calculate_fisher_information(make_model().eval(), [batch], progress=False)
    assert f"{tables} tensors by modules done again" in caplog.text
    assert "embed_positions.weight: " not in caplog.text, "nothing was tried in vain"


@pytest.mark.parametrize("case", ["opt", "bart", "gemma", "masked bert", "t5"])
def test_in_16_bits_no_wrong_rule_is_taken_for_rounding(case: str) -> None:
    """Where a layer counts positions itself, rows that lie side by side in its table are told apart by place alone."""
    torch.manual_seed(0)
    make_model, make_batch = CASES[case]
    model: nn.Module = make_model().eval()
    batches = [make_batch(torch.Generator().manual_seed(seed)) for seed in range(2)]
    by_loop = calculate_fisher_information(model, batches, method="loop", progress=False)
    scores = calculate_fisher_information(model.to(torch.bfloat16), batches, progress=False)
    largest = max(float(each.norm()) for each in by_loop.values())
    for name, each in by_loop.items():
        if float(each.norm()) > 1e-4 * largest:
            assert float((scores[name] - each).norm()) < 0.2 * float(each.norm()), name


def test_tokens_that_are_routed_are_no_batch() -> None:
    """An expert that sees all tokens of one batch sees, of the next, a number that fits its size by chance."""

    class Routed(nn.Module):
        loss_type = "ForSequenceClassification"

        def __init__(self) -> None:
            super().__init__()
            self.expert, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> object:
            chosen = x[..., 0] > 0
            hidden = x.clone()
            hidden[chosen] = self.expert(x[chosen])
            logits = self.head(hidden.mean(1))
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return type("Output", (), {"logits": logits, "loss": loss})()

    torch.manual_seed(0)
    model, labels = Routed(), torch.tensor([0, 1])
    everywhere = torch.randn(2, 4, 6)
    everywhere[..., 0] = 1.0
    uneven = everywhere.clone()
    uneven[0, :2, 0] = -1.0  # six tokens: two of the first example, four of the second
    batches = [{"x": everywhere, "labels": labels}, {"x": uneven, "labels": labels}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FishTuningWarning)
        scores = calculate_fisher_information(model, batches, progress=False)
    assert_scores_close(scores, calculate_fisher_information(model, batches, method="loop", progress=False))
