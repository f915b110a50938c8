"""Prompts that PEFT computes once for all examples: scored in batches, as each example's own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tiny import assert_scores_close, bert, causal_batch, classification_batch, llama
from torch import Tensor, nn

from fish_tuning import FishTuningWarning, calculate_fisher_information
from fish_tuning.scores.prompts import a_prompt_each

CONFIGS: dict[str, dict[str, Any]] = {
    "prompt": {},
    "MLP": {"encoder_hidden_size": 16},
    "LSTM": {"encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"},
}


def prompted(kind: str, causal: bool = False) -> nn.Module:
    torch.manual_seed(0)
    make = PromptTuningConfig if kind == "prompt" else PromptEncoderConfig
    config = make(task_type="CAUSAL_LM" if causal else "SEQ_CLS", num_virtual_tokens=3, **CONFIGS[kind])
    return get_peft_model(llama() if causal else bert(), config)


@pytest.mark.parametrize("causal", [False, True], ids=["classifier", "language model"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_in_batches_as_by_the_loop(kind: str, causal: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = prompted(kind, causal), causal_batch() if causal else classification_batch()
    with caplog.at_level("INFO", "fish_tuning"), warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        scores = calculate_fisher_information(model, [batch], progress=False)
    assert "by the loop" not in caplog.text
    assert "get_prompt" not in vars(model)
    by_loop = calculate_fisher_information(model, [batch], method="loop", progress=False)
    assert_scores_close(scores, by_loop)
    assert all(score.any() for name, score in scores.items() if "prompt_encoder" in name and "hh" not in name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_prompts_are_the_same(kind: str) -> None:
    model: Any = prompted(kind).eval()
    with torch.no_grad():
        given = model.get_prompt(4)
        with a_prompt_each(model):
            torch.testing.assert_close(model.get_prompt(4), given)
            assert torch.equal(model.get_prompt(1), given[:1])


def test_what_another_version_of_peft_does_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = PeftModel.get_prompt

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * given(self, *args, **kwargs)  # type: ignore[no-any-return]

    monkeypatch.setattr(PeftModel, "get_prompt", doubled)
    model, batch = prompted("prompt"), classification_batch()
    with a_prompt_each(model):
        assert "get_prompt" not in vars(model)
    with pytest.warns(FishTuningWarning, match="one example at a time"):
        scores = calculate_fisher_information(model, [batch], progress=False)
    assert_scores_close(scores, calculate_fisher_information(model, [batch], method="loop", progress=False))
