"""What values would decide: the experts that tokens go to, and where texts end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from folders import write_tokenizer
from passes import arguments, faked, real_pass, shapes
from tiny import Batch, bert, causal_batch, classification_batch, llama_config, lora
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.costs.experiment_costs import experiment_costs
from fish_tuning.experiments.costs.training_pass import training_pass
from fish_tuning.experiments.costs.unknown_values import EqualShares, experts_of, looks_for_ends
from fish_tuning.experiments.run.plan import plan_experiment

EOS = 2
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "pad_token_id": 0,
      "eos_token_id": EOS, "decoder_start_token_id": 0, "num_labels": 3}  # fmt: skip
BART = {"vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0,
        "eos_token_id": EOS, "decoder_start_token_id": EOS, "num_labels": 3, "max_position_embeddings": 64}  # fmt: skip


def mixtral(experts: str | None = None) -> nn.Module:
    settings = llama_config().to_dict() | {"intermediate_size": 96, "num_local_experts": 4}
    config = hf.MixtralConfig(**{name: value for name, value in settings.items() if name not in LLAMAS_OWN})
    return hf.MixtralForCausalLM._from_config(config, experts_implementation=experts)


LLAMAS_OWN = ("model_type", "architectures", "transformers_version")


def qwen() -> nn.Module:
    settings = llama_config().to_dict() | {"num_experts": 4, "moe_intermediate_size": 48, "num_experts_per_tok": 2}
    settings |= {"shared_expert_intermediate_size": 24}
    return hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**{name: value for name, value in settings.items() if name not in LLAMAS_OWN})
    )


def ended(batch: Batch) -> Batch:
    """Each text's last token is the end of it."""
    last = batch["attention_mask"].sum(1) - 1
    batch["input_ids"][torch.arange(len(last)), last] = EOS
    return batch


def tokens() -> Batch:
    return causal_batch((24, 9, 17, 24))


def texts() -> Batch:
    return ended(classification_batch((24, 9, 17, 24)))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch], dict[str, Any]]] = {
    "mixtral": (mixtral, tokens, {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
    "mixtral, eager": (
        lambda: mixtral("eager"), tokens, {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
    "mixtral, experts": (mixtral, tokens, {
        "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"], "lora_dropout": 0.0,
        "task_type": "CAUSAL_LM"}),
    "qwen": (qwen, tokens, {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
    "t5": (lambda: hf.T5ForSequenceClassification(hf.T5Config(**T5)), texts, {"target_modules": ["q", "v"]}),
    "bart": (
        lambda: hf.BartForSequenceClassification(hf.BartConfig(**BART)), texts,
        {"target_modules": ["q_proj", "v_proj"]}),
}  # fmt: skip


def made(name: str) -> Any:
    make, _, how = MODELS[name]
    torch.manual_seed(0)
    return lora(make(), **how)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", [{}, {"bf16": True, "checkpoints": True}])
def test_the_peak_is_that_of_a_real_step(name: str, how: dict[str, bool]) -> None:
    args, batch = arguments(**how), MODELS[name][1]()
    model, mode, _ = faked(made(name))
    said = training_pass(model, mode, shapes(batch), args, gpu=False)
    found = real_pass(made(name), batch, args)
    assert found.peak() > 0
    for asked in (0.0, 0.5, 1.0):
        assert said.peak(asked) == pytest.approx(found.peak(asked), rel=0.1)


@pytest.mark.parametrize("name", ["mixtral", "mixtral, eager", "t5"])
def test_experiments_on_them_are_planned_to_the_end(
    name: str, experiment: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    make, _, how = MODELS[name]
    write_tokenizer(tmp_path / "model")
    make().config.save_pretrained(tmp_path / "model")  # type: ignore[operator, union-attr]
    eager = "model.config_overrides={_experts_implementation: eager}" if "eager" in name else "seeds=[1]"
    config = experiment(
        f"model.name={tmp_path / 'model'}", f"lora.target_modules={how['target_modules']}", eager,
        "fish_tuning.methods_to_run=[lora-fish]",
    )  # fmt: skip
    costs = experiment_costs(config, plan_experiment(config), devices=[1])
    assert not any("traced" in note for note in costs.notes)
    assert ("Tokens are taken to be spread evenly over the 4 experts of a layer." in costs.notes) == ("mixtral" in name)
    (arm,) = costs.arms
    assert arm.activations
    assert arm.devices[0].peak
    assert arm.calibration_peak


def test_experts_get_equal_shares_and_what_follows_from_them_is_known() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, EqualShares(4):
        _, chosen = torch.topk(torch.zeros(6, 4), 2, dim=-1)
        counted = nn.functional.one_hot(chosen, num_classes=5).sum((0, 1))
        assert counted.tolist() == [3, 3, 3, 3, 0]
        assert all(len(set(pair)) == 2 for pair in chosen.tolist())


def test_only_those_that_need_it_are_decided_for() -> None:
    assert experts_of(made("mixtral")) == experts_of(made("qwen")) == 4
    assert experts_of(lora(bert())) == experts_of(nn.Linear(1, 1)) == 0
    assert looks_for_ends(made("t5"))
    assert looks_for_ends(hf.BartForSequenceClassification(hf.BartConfig(**BART)))
    assert not looks_for_ends(lora(bert()))
    assert not looks_for_ends(made("mixtral"))
