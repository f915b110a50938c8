"""What the adapters refuse, before anything is changed, and how they say it."""

from __future__ import annotations

from typing import Any

import adapter_models as models
import pytest
import tiny
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, T5Config, T5ForConditionalGeneration

from fish_tuning import FishTuningError
from fish_tuning.adapters import AdapterError, SerialAdapterConfig, UniPELTConfig


def deberta() -> nn.Module:
    return DebertaV2ForSequenceClassification(DebertaV2Config(**models.SIZE)).eval()


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    ).eval()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"bottleneck_size": 0}, r"SerialAdapterConfig: bottleneck_size=0 must be a whole number from 1\."),
        ({"bottleneck_size": 2.5}, r"bottleneck_size=2\.5 must be a whole number from 1\."),
        ({"init_std": "1e-2"}, r"init_std='1e-2' must be a number above 0\."),
        ({"dropout": 1.0}, r"dropout=1.0 must be a probability below 1\."),
        ({"init_std": 0}, r"init_std=0 must be a number above 0\."),
        ({"layers_to_transform": []}, r"layers_to_transform=\[\] must be layer numbers, or None"),
        ({"non_linearity": "gelo"}, r"'gelo' is not one of gelu, relu, silu, tanh\. Did you mean 'gelu'\?"),
    ],
)
def test_values_out_of_range_are_named(own: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        SerialAdapterConfig(**own)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"r": 0}, "UniPELTConfig: r=0 must be a whole number from 1"),
        ({"lora_alpha": 0}, "lora_alpha=0 must be a number above 0"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0 must be a whole number from 1"),
        ({"gate_bias": None}, "gate_bias=None must be a number"),
        ({"target_modules": "all-linear"}, "target_modules='all-linear' must be the names of its own layers"),
    ],
)
def test_unipelt_names_its_own_values(own: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        UniPELTConfig(**own)


@pytest.mark.parametrize(
    ("method", "make", "own", "message"),
    [
        ("serial", t5, {}, r"T5ForConditionalGeneration has no layers .*DenseReluDense\.wo.* Set target_modules"),
        ("serial", lambda: nn.Sequential(nn.Linear(2, 2)), {}, r"Sequential .* linear layers are 0\. Set"),
        (
            "serial",
            tiny.bert,
            {"target_modules": ["atention.output.dense"]},
            r"no module 'atention.* Did you mean 'att",
        ),
        (
            "serial",
            tiny.bert,
            {"target_modules": ["embeddings"]},
            r"'embeddings' means bert.embeddings, which is a Bert",
        ),
        ("serial", tiny.bert, {"layers_to_transform": [1, 2]}, r"\[1, 2\]: Bert.* has layers 0 to 1, not \[2\]\."),
        ("unipelt", deberta, {}, r"DebertaV2ForSequenceClassification does not take its attention from .* Use a model"),
        ("unipelt", t5, {}, "T5ForConditionalGeneration does not take its attention"),
        ("unipelt", lambda: nn.Sequential(nn.Linear(2, 2)), {}, "Sequential does not take its attention"),
        ("unipelt", tiny.bert, {"prefix_modules": ["query", "key"]}, "means .*query, .*key in a BertSelfAttention"),
        ("unipelt", tiny.bert, {"prefix_modules": ["intermediate.dense"]}, "in a BertIntermediate; it must mean one"),
        ("unipelt", tiny.bert, {"feedforward_modules": ["output.dense", "query"]}, "query is in target_modules or"),
        ("unipelt", tiny.bert, {"feedforward_modules": ["wo"]}, "feedforward_modules: Bert.* has no module 'wo'"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_left_alone(
    method: str, make: Any, own: dict[str, Any], message: str
) -> None:
    for device in ("cpu", "meta"):  # without weights as well
        with torch.device(device):
            model = make()
        before = [(name, type(module)) for name, module in model.named_modules()]
        with pytest.raises(AdapterError, match=message) as caught:
            get_peft_model(model, models.CONFIGS[method](**own))
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value, FishTuningError)
        assert [(name, type(module)) for name, module in model.named_modules()] == before
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert getattr(getattr(model, "config", None), "_attn_implementation", "") != "fish_prefix"


def test_deberta_takes_the_serial_adapter() -> None:
    model = get_peft_model(deberta(), SerialAdapterConfig(task_type="SEQ_CLS"))
    assert sum("serial_adapter_up" in name for name, _ in model.named_parameters()) == 8


def test_a_second_adapter_must_use_the_layers_as_the_first() -> None:
    model = models.adapted("unipelt")
    with pytest.raises(AdapterError, match="it can be in one kind"):
        model.add_adapter(
            "second", UniPELTConfig(target_modules=["output.dense"], feedforward_modules=["intermediate.dense"])
        )
    models.logits(model, models.batch())


def test_another_attention_function_is_not_let_to_drop_the_prefix() -> None:
    model = models.adapted("unipelt")
    model.get_base_model().set_attn_implementation("eager")
    with pytest.raises(AdapterError, match=r"set to 'eager'.* set_attn_implementation\('fish_prefix'\)"):
        models.logits(model, models.batch())
    with model.disable_adapter():
        models.logits(model, models.batch())


def test_a_projection_behind_the_attention_cannot_hold_the_prefix() -> None:
    model = models.adapted("unipelt", "llama", prefix_modules=["o_proj"])
    with pytest.raises(AdapterError, match="must name the projection that makes the queries"):
        models.logits(model, models.batch("llama"))


def test_attention_with_capped_logits_is_refused() -> None:
    model = tiny.llama()
    model.config.attn_logit_softcapping = 50.0
    with pytest.raises(AdapterError, match="caps its attention's logits"):
        models.adapted("unipelt", "llama", model=model)


def test_a_configuration_that_does_not_tell_the_width_of_the_keys_is_found_out() -> None:
    model = tiny.llama()
    model.config.num_key_value_heads = 4
    with pytest.raises(
        AdapterError, match="A prefix of width 16 does not fit an attention layer with 2 heads of size 4"
    ):
        models.logits(models.adapted("unipelt", "llama", model=model), models.batch("llama"))


def test_arguments_that_the_attention_would_ignore_are_refused() -> None:
    model = models.adapted("unipelt", "llama")
    with pytest.raises(AdapterError, match="LlamaAttention uses 'softcap' in its attention"):
        model(**models.batch("llama"), softcap=30.0)


def test_a_peft_that_could_not_save_the_adapter_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BaseTuner, "_get_adapter_state_dict")
    with pytest.raises(AdapterError, match=r"UniPELTConfig needs peft 0\.21 or later, and .* Upgrade with pip"):
        UniPELTConfig()
