"""What a key holds and what it leaves out, told by whether runs would be repeated."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import write_bert
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.loading import load_experiment
from fish_tuning.experiments.data import builtin
from fish_tuning.experiments.records import run_keys
from fish_tuning.experiments.records.run_keys import RunKeys
from fish_tuning.experiments.records.shared_keys import effective_arguments
from fish_tuning.experiments.run.context import make_context
from fish_tuning.experiments.run.plan import plan_experiment

MakeExperiment = Callable[..., ExperimentConfig]


def keys(config: ExperimentConfig, arm: str = "lora-fish", seed: int = 1, rate: float | None = None) -> RunKeys:
    context = make_context(config, plan_experiment(config), TrainerCallback())
    return context.keys(next(plan for plan in context.plan.arms if plan.arm == arm), seed, rate)


@pytest.mark.parametrize(
    "override",
    [
        "name=another",
        "training.output_dir=elsewhere",
        "training.args_override.run_name=mine",
        "training.args_override.logging_steps=0.5",
        "training.args_override.dataloader_pin_memory=true",
        "training.args_override.dataloader_num_workers=2",
        "training.args_override.save_strategy=epoch",
        "training.args_override.weight_decay=0.0",  # the default, said
        "training.args_override.hub_token=hf_secret",
        "training.args_override.dataloader_persistent_workers=false",
        "lora.baseline_rank=2",
        "seeds=[1, 2, 3]",
        "fish_tuning.methods_to_run=[lora-fish]",
        "training.max_seq_length=64",  # no text is as long as either
    ],
)
def test_what_cannot_change_a_result_is_not_in_the_key(experiment: MakeExperiment, override: str) -> None:
    assert keys(experiment(override)) == keys(experiment())


@pytest.mark.parametrize("arm", ["lora", "lora-fish", "lora-fish-rand"])
def test_what_is_scored_in_16_bits_is_not_what_was_scored_in_32(
    experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    """Of the records of before autocast was scored under, those of scored arms with mixed precision hold no more."""
    digested: list[dict[str, Any]] = []
    monkeypatch.setattr(run_keys, "digest", lambda parts: digested.append(dict(parts)) or "")
    for mixed in ("bf16=true", "bf16=false"):
        keys(experiment(f"training.args_override.{mixed}"), arm)
    said = [parts.get("scored_in") for parts in digested[::3]]
    assert said == ["bf16" if arm == "lora-fish" else None, None]


@pytest.mark.parametrize(
    "override",
    [
        "training.args_override.learning_rate=0.5",
        "training.args_override.weight_decay=0.1",
        "training.args_override.bf16=true",
        "training.args_override.eval_strategy=epoch",  # it draws random numbers
        "training.args_override={dataloader_num_workers: 1, dataloader_persistent_workers: true}",
        "training.args_override={dataloader_num_workers: 2, dataloader_in_order: false}",
        "training.early_stopping_patience=3",
        "model.dtype=bfloat16",
        "model.quantization_config.load_in_4bit=true",
        "model.device_map=cpu",
        "model.config_overrides.hidden_dropout_prob=0.3",
        "dataset.metric=f1_macro",
        "dataset.max_train_samples=32",
        "dataset.training_args.num_train_epochs=2",
        "peft.training_args.num_train_epochs=2",
        "peft.args.lora_alpha=3",
        "lora.init_lora_weights=pissa",
        "lora.fish_rank=6",
        "fish_tuning.num_samples=4",
        "fish_tuning.warmup_steps=3",
        "training.max_seq_length=5",
    ],
)
def test_what_can_change_a_result_is_in_the_key(experiment: MakeExperiment, override: str) -> None:
    other, own = keys(experiment(override)), keys(experiment())
    assert other.run != own.run
    assert other.setting != own.setting


def test_keys_of_runs_on_weights_as_they_are_stored_say_nothing_of_how_they_are_loaded(
    experiment: MakeExperiment,
) -> None:
    """Runs of earlier versions keep their keys."""
    shared = make_context(experiment(), plan_experiment(experiment()), TrainerCallback()).shared
    assert shared.keys().isdisjoint(("quantization_config", "device_map", "max_memory"))
    four = "model.quantization_config={load_in_4bit: true}"
    said = "model.quantization_config={load_in_4bit: true, bnb_4bit_quant_type: fp4}"
    other = "model.quantization_config={load_in_4bit: true, bnb_4bit_quant_type: nf4}"
    assert keys(experiment(four)) == keys(experiment(said)) != keys(experiment(other))


def test_seeds_share_a_setting_and_arms_do_not(experiment: MakeExperiment) -> None:
    one, two = keys(experiment(), seed=1), keys(experiment(), seed=2)
    assert one.run != two.run
    assert one.setting == two.setting
    assert keys(experiment(), "lora-fish-rev").setting != one.setting


def test_rates_that_were_chosen_from_one_list_share_a_setting(experiment: MakeExperiment) -> None:
    listed = experiment("training.learning_rates=[0.1, 0.2]")
    one, two = keys(listed, rate=0.1), keys(listed, rate=0.2)
    assert one.run != two.run
    assert one.setting == two.setting != keys(experiment("training.learning_rates=[0.1]"), rate=0.1).setting


def test_arms_share_what_no_arm_has_of_its_own(experiment: MakeExperiment) -> None:
    own = keys(experiment())
    assert keys(experiment(), "lora", seed=2)[2:] == own[2:]
    for arm in ("lora", "lora-fish"):  # what chooses or sizes the entries of an arm is its own
        assert keys(experiment("lora.fish_rank=6", "fish_tuning.num_samples=4"), arm)[2:] == own[2:]
    for override in ("training.args_override.max_steps=2", "lora.dropout=0.1", "training.head_learning_rate=0.3"):
        other = keys(experiment(override), "lora")
        assert (other.common != own.common, other.method_own) == (True, own.method_own)


def test_a_method_may_have_arguments_and_rates_of_its_own(experiment: MakeExperiment) -> None:
    own = keys(experiment())
    for override in ("peft.training_args.learning_rate=0.3", "peft.learning_rates=[0.1, 0.2]"):
        other = keys(experiment(override), rate=0.1)
        assert (other.common, other.method_own != own.method_own) == (own.common, True)
    listed = experiment("training.learning_rates=[0.1, 0.2]")
    assert keys(listed, "lora", rate=0.1)[2:] == keys(listed, rate=0.2)[2:]
    assert keys(listed, rate=0.1).common != own.common


def test_a_random_choice_depends_on_no_scores(experiment: MakeExperiment) -> None:
    rand = "lora-fish-rand"
    assert keys(experiment("fish_tuning.num_samples=4", "fish_tuning.warmup_steps=3"), rand) == keys(experiment(), rand)


def test_weights_count_and_their_place_does_not(
    experiment: MakeExperiment, bert_folder: Path, sentences_folder: Path, tmp_path: Path
) -> None:
    copy, data = tmp_path / "copy", tmp_path / "data"
    shutil.copytree(bert_folder, copy)
    shutil.copytree(sentences_folder, data)
    elsewhere = experiment(f"model.name={copy}", f"dataset.load_args=[{data}]")
    assert keys(elsewhere) == keys(experiment())
    weights = load_file(copy / "model.safetensors")
    next(iter(weights.values()))[0] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert keys(elsewhere).run != keys(experiment()).run


def test_another_tokenizer_counts(experiment: MakeExperiment, bert_folder: Path, tmp_path: Path) -> None:
    copy = write_bert(tmp_path / "copy")
    words = (copy / "vocab.txt").read_text().split()
    words[5], words[9] = words[9], words[5]
    (copy / "vocab.txt").write_text("\n".join(words))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    shutil.copy(bert_folder / "tokenizer_config.json", copy)
    shutil.copy(bert_folder / "model.safetensors", copy)
    assert keys(experiment(f"model.name={copy}")).run != keys(experiment()).run


def test_a_fresh_cache_gives_the_same_keys_as_a_filled_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FISH_TUNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin, "PRETRAIN_EPOCHS", 1)
    config = load_experiment("digits")
    assert keys(config) == keys(config)
    shutil.copytree(tmp_path / "cache", tmp_path / "moved")
    before = keys(config)
    monkeypatch.setenv("FISH_TUNING_CACHE", str(tmp_path / "moved"))
    assert keys(config) == before


def test_saving_counts_where_the_best_checkpoint_comes_back() -> None:
    arguments = {"save_strategy": "epoch", "logging_dir": "logs", "learning_rate": 0.1}
    assert effective_arguments(arguments) == {"learning_rate": 0.1}
    best = {**arguments, "load_best_model_at_end": True}
    assert effective_arguments(best) == {"save_strategy": "epoch", "learning_rate": 0.1, "load_best_model_at_end": True}


@pytest.mark.parametrize(
    "variables", [{"ACCELERATE_MIXED_PRECISION": "bf16"}, {"ACCELERATE_USE_FSDP": "true"}], ids=str
)
def test_what_accelerate_launch_decides_counts(
    experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    config = experiment()
    context = make_context(config, plan_experiment(config), TrainerCallback())
    before = context.keys(context.plan.arms[0], 1, None)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert context.keys(context.plan.arms[0], 1, None) == before
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    after = context.keys(context.plan.arms[0], 1, None)
    assert after.run != before.run
    assert after.setting != before.setting
