"""The counts of the three published experiments come from models of their shapes, without weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from folders import write_bert, write_llama, write_llama_config, write_sums
from transformers import BertConfig, BloomConfig, RobertaConfig, Trainer, TrainerCallback

from fish_tuning.errors import ConfigurationError, FishTuningError
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.loading import load_experiment
from fish_tuning.experiments.run.context import make_context
from fish_tuning.experiments.run.launch import ALONE, Launch, check_launch
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.sharing.lengths import positions_of

MakeExperiment = Callable[..., ExperimentConfig]

BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
             "vocab_size": 28996}  # fmt: skip
BERT_TINY = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512,
             "vocab_size": 30522}  # fmt: skip
TINY_LLAMA = {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
              "intermediate_size": 5632, "vocab_size": 32000}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "baseline", "fish", "head"),
    [
        ("bert-base-sst2", BERT_BASE, 443_906, 443_906, 1_538),
        ("tinyllama-rotten-tomatoes", TINY_LLAMA, 2_256_896, 564_224, 4_096),
        ("bert-tiny-sst2", BERT_TINY, 6_402, 3_201, 258),
    ],
)
def test_published_counts(
    name: str, shape: dict[str, int], baseline: int, fish: int, head: int, tmp_path: Path, sentences_folder: Path
) -> None:
    write = write_llama_config if "llama" in name else write_bert
    kwargs = {} if "llama" in name else {"weights": False}
    folder = write(tmp_path / "model", **kwargs, **shape)  # type: ignore[operator]
    overrides = [f"model.name={folder}", f"dataset.load_args=[{sentences_folder}]", "fish_tuning.num_samples=8"]
    plan = plan_experiment(load_experiment(name, overrides))
    counts = {arm.arm: arm.trainable_parameters for arm in plan.arms}
    masked = dict.fromkeys(("lora-fish", "lora-fish-rand", "lora-fish-rev"), fish)
    assert counts == {"lora": baseline, **masked, "head": head}
    assert all(arm.kept + arm.dense == arm.trainable_parameters for arm in plan.arms)


def test_the_head_counts_and_is_not_in_the_pool(experiment: MakeExperiment) -> None:
    lora, fish, *_ = plan_experiment(experiment()).arms
    head = 2 * 16 + 2
    assert lora.dense == fish.dense == head
    assert lora.trainable_parameters == 2 * 3 * 2 * (16 + 16) + head
    assert (fish.pool, fish.trainable_parameters) == (2 * 3 * 4 * (16 + 16), round(lora.trainable_parameters / 2))


def test_facts_tell_what_was_found(experiment: MakeExperiment) -> None:
    facts = plan_experiment(experiment()).facts
    assert facts["target_modules"] == {"lora": ["key", "query", "value"]}
    assert (facts["train_examples"], facts["validation_examples"], facts["num_labels"]) == (48, 24, 2)
    assert (facts["init_lora_weights"], facts["warmup_steps_before_scoring"]) == (True, {"lora": 8})
    assert facts["versions"]["fish-tuning"] == "0.1.0"
    starts = "peft=[{method: lora}, {name: other, method: lora, args: {init_lora_weights: pissa}}, {method: ia3}]"
    assert plan_experiment(experiment(starts)).facts["init_lora_weights"] == {"lora": True, "other": "pissa"}


def test_a_start_that_leaves_half_unscored_is_noted(experiment: MakeExperiment) -> None:
    assert not plan_experiment(experiment()).notes
    assert not plan_experiment(experiment("lora.init_lora_weights=pissa")).notes
    assert "every A scores exactly zero" in plan_experiment(experiment("fish_tuning.warmup_steps=0")).notes[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fish_tuning.prune_to_ratio_of_baseline=0.01", "34 parameters outside the pool always train"),
        ("lora.fish_rank=1", "the pool has 192 entries"),
        ("fish_tuning.num_samples=49", "more than the 48 training examples"),
        ("lora.names_to_exclude=[clasifier]", "'clasifier' matches none"),
        ("lora.target_modules=[q_proj]", "no module 'q_proj'"),
        ("training.args_override.eval_strategy=epochs", "training.args_override: .*epochs"),
        ("training.args_override.per_device_train_batch_size=0", "per_device_train_batch_size=0: must be a whole"),
        ("training.args_override.num_train_epochs=0", "num_train_epochs=0: must be a number above 0, or set max_steps"),
        ("training.args_override.learning_rate=-0.1", r"learning_rate=-0\.1: must be a number above 0"),
        ("training.args_override.report_to=neptune", "'neptune': its package is not installed"),
        ("training.args_override.report_to=[wandbb]", r"no such report\. Did you mean 'wandb'\?"),
        ("training.args_override.report_to=null", "None: "),
        (
            "training.args_override.dataloader_num_workers=-1",
            "num_workers=-1: must be a whole number from 0",
        ),
        ("training.args_override.dataloader_persistent_workers=true", "needs dataloader_num_workers from 1"),
        ("training.args_override.train_sampling_strategy=randon", "one of random, .*Did you mean 'random'"),
        ("training.args_override.prediction_loss_only=true", "prediction_loss_only=true: evaluations would bring no"),
        ("training.args_override.batch_eval_metrics=true", "batch_eval_metrics=true: evaluations would bring no"),
        ("training.args_override.eval_do_concat_batches=false", "eval_do_concat_batches=false: evaluations would"),
        ("training.args_override.label_names=[foo]", r"label_names=\['foo'\]: batches have their labels under"),
        (
            "training.args_override={load_best_model_at_end: true, metric_for_best_model: acuracy, "
            "eval_strategy: epoch, save_strategy: epoch}",
            "metric_for_best_model='acuracy': evaluations bring loss, accuracy, .* Did you mean 'accuracy'",
        ),
        ("peft.args.init_lora_weights=pisa", r"init_lora_weights='pisa': must be one of .* Did you mean 'pissa'"),
        ("training.max_seq_length=2", r"max_seq_length=2 leaves no room for a text beside the 2 .* 3 or more"),
        ("model.config_overrides.num_hidden_layers=100000000", "10000 layers are the most"),
        ("training.args_override.auto_find_batch_size=true", "smaller batches than the others"),
        (
            "training.args_override={dataloader_drop_last: true, per_device_train_batch_size: 49}",
            "leaves nothing of 48 training examples in batches of 49",
        ),
        ("training.args_override.lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_kwargs={}: One of min_lr"),
        (
            "training.args_override={lr_scheduler_type: linear, lr_scheduler_kwargs: {min_lr: 1}}",
            "lr_scheduler_type=linear with .* 'min_lr'",
        ),
        ("model.config_overrides.vocab_size=10", "vocab_size=10 is less than the .* tokens of the tokenizer"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_trained(
    experiment: MakeExperiment, override: str, message: str
) -> None:
    ratio = [] if "ratio" in override else ["fish_tuning.prune_to_ratio_of_baseline=1.0"]
    with pytest.raises(FishTuningError, match=message):
        plan_experiment(experiment(*ratio, override))


def test_an_installed_name_is_no_guess(experiment: MakeExperiment) -> None:
    with pytest.raises(FishTuningError) as caught:
        plan_experiment(experiment("training.args_override.report_to=neptune"))
    assert "Did you mean" not in str(caught.value)


def test_a_best_checkpoint_by_a_metric_of_the_task_is_fine(experiment: MakeExperiment) -> None:
    best = "training.args_override={load_best_model_at_end: true, metric_for_best_model: eval_f1_macro, "
    assert plan_experiment(experiment(best + "eval_strategy: epoch, save_strategy: epoch}")).arms


def test_one_process_has_nothing_to_shard(experiment: MakeExperiment) -> None:
    sharded = experiment("training.args_override.fsdp=full_shard")
    check_launch(experiment(), ALONE)
    check_launch(sharded, Launch(0, 2, 0))
    with pytest.raises(FishTuningError, match="fsdp='full_shard' shards over several processes"):
        check_launch(sharded, ALONE)


def test_as_many_warm_up_steps_are_told_as_there_are_examples(experiment: MakeExperiment) -> None:
    few = experiment("fish_tuning.num_samples=8")
    assert plan_experiment(few).facts["warmup_steps_before_scoring"] == {"lora": 8}
    assert few.start(few.peft[0]).endswith("scored after 8 warm-up steps")


def test_a_share_is_planned_with_all_its_digits(experiment: MakeExperiment) -> None:
    shares = experiment("protocol=fixed_layers", "fish_tuning.keep_ratio=[0.5, 0.12345678]")
    assert [arm for arm in shares.arms if arm.startswith("lora-fish@")] == ["lora-fish@0.5", "lora-fish@0.12345678"]
    kept = plan_experiment(shares).arm("lora-fish@0.12345678")
    assert kept.kept == round(0.12345678 * kept.pool)


def test_what_needs_no_data_is_told_first(experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("fish_tuning.experiments.run.plan.load_task")
    with pytest.raises(FishTuningError, match="there is no folder"):
        plan_experiment(experiment("model.name=./nowhere"))
    with pytest.raises(FishTuningError, match="no 'hiden_size'"):
        plan_experiment(experiment("model.config_overrides.hiden_size=3"))
    with pytest.raises(FishTuningError, match=r"num_samples=8 is more than dataset\.max_train_samples=7"):
        plan_experiment(experiment("dataset.max_train_samples=7"))


def test_steps_in_place_of_epochs_are_fine(experiment: MakeExperiment) -> None:
    assert plan_experiment(
        experiment("training.args_override.num_train_epochs=0", "training.args_override.max_steps=2")
    ).arms


def test_texts_longer_than_the_positions_are_told(experiment: MakeExperiment, tmp_path: Path) -> None:
    model = f"model.name={write_bert(tmp_path / 'short', max_position_embeddings=8)}"
    with pytest.raises(FishTuningError, match=r"a text of 11 tokens pass, more than the 8 positions .* set it to 8 or"):
        plan_experiment(experiment(model))
    assert plan_experiment(experiment(model, "training.max_seq_length=8")).arms


def test_roberta_has_two_positions_fewer() -> None:
    assert positions_of(RobertaConfig(max_position_embeddings=66)) == 64
    assert positions_of(BertConfig(max_position_embeddings=66)) == 66
    assert positions_of(BloomConfig()) is None


def test_a_plan_cannot_be_changed(experiment: MakeExperiment) -> None:
    plan = plan_experiment(experiment())
    with pytest.raises(TypeError):
        plan.facts["metric"] = "another"  # type: ignore[index]
    assert isinstance(plan.arms, tuple)
    assert isinstance(plan.notes, tuple)


def test_the_head_alone_has_no_pool(experiment: MakeExperiment) -> None:
    arms = "fish_tuning.methods_to_run=[lora, head]"
    head = plan_experiment(experiment(arms, "lora.names_to_exclude=[modules_to_save, lora_A]")).arms[-1]
    assert (head.arm, head.trainable_parameters, head.dense, head.pool, head.kept) == ("head", 34, 34, 0, 0)


def test_the_head_is_left_out_where_a_task_brings_none(experiment: MakeExperiment, tmp_path: Path) -> None:
    texts = [f"model.name={write_llama(tmp_path / 'llama')}", f"dataset.load_args=[{write_sums(tmp_path / 'sums')}]"]
    plan = plan_experiment(experiment(*texts))
    assert [arm.arm for arm in plan.arms] == ["lora", "lora-fish", "lora-fish-rand", "lora-fish-rev"]
    assert "The arm head is left out: causal_lm brings no new head to train." in plan.notes
    with pytest.raises(ConfigurationError, match="causal_lm brings none; name another arm, such as lora"):
        plan_experiment(experiment(*texts, "fish_tuning.methods_to_run=[head]"))


def test_only_what_looks_at_examples_asks_for_them(experiment: MakeExperiment) -> None:
    many = "fish_tuning.num_samples=128"
    plan_experiment(experiment(many, "fish_tuning.methods_to_run=[lora, lora-fish-rand]"))
    plan_experiment(experiment(many, "peft=[{method: lora, fish_tuning: {num_samples: 16}}]"))
    with pytest.raises(ConfigurationError, match="128 is more than the 48 training examples"):
        plan_experiment(
            experiment(many, "fish_tuning.methods_to_run=[lora]", "lora.init_lora_weights=eva")  # looks at data
        )


def test_batches_of_trials_are_smaller(experiment: MakeExperiment) -> None:
    drop = "training.args_override={dataloader_drop_last: true, per_device_train_batch_size: 40, use_cpu: true}"
    plan_experiment(experiment(drop))
    with pytest.raises(ConfigurationError, match="leaves nothing of 38 training examples"):
        plan_experiment(experiment(drop, "training.learning_rates=[0.1, 0.01]"))


def test_smoothed_labels_are_noted_where_something_is_scored(experiment: MakeExperiment) -> None:
    smoothed = "training.args_override.label_smoothing_factor=0.2"
    assert "label_smoothing_factor=0.2: the Trainer trains on" in "".join(plan_experiment(experiment(smoothed)).notes)
    unscored = experiment(smoothed, "fish_tuning.methods_to_run=[lora, lora-fish-rand]")
    assert not plan_experiment(unscored).notes


def test_an_optimizer_that_is_not_installed_is_noted_and_not_run(
    experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: Any) -> None:
        raise ImportError("You need to install `lomo_optim`.")

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", missing)
    config = experiment("training.args_override.optim=lomo")
    plan = plan_experiment(config)
    assert "optim=lomo cannot run here: You need to install" in plan.notes[-1]
    with pytest.raises(ConfigurationError, match="Or take another optim"):
        make_context(config, plan, TrainerCallback())


def test_samples_are_of_the_rows_that_are_used(experiment: MakeExperiment, tmp_path: Path) -> None:
    """Of ten rows, five have a prompt that fills the length; where rates are tried, four are left."""
    (tmp_path / "rows").mkdir()
    rows = {"prompt": ["good " * 40, "bad"] * 5, "completion": ["it"] * 10}
    Dataset.from_dict(rows).to_parquet(tmp_path / "rows" / "train.parquet")
    Dataset.from_dict({"prompt": ["bad"], "completion": ["it"]}).to_parquet(tmp_path / "rows" / "validation.parquet")
    settings = [
        f"model.name={write_llama(tmp_path / 'llama')}",
        "dataset.load_args=[" + str(tmp_path / "rows") + "]",
        "fish_tuning.methods_to_run=[lora, lora-fish]",
        "training.max_seq_length=32",
    ]
    plan_experiment(experiment(*settings, "fish_tuning.num_samples=5"))
    with pytest.raises(
        ConfigurationError, match=r"num_samples=6 is more than the 5 .* fills training\.max_seq_length=32"
    ):
        plan_experiment(experiment(*settings, "fish_tuning.num_samples=6"))
    with pytest.raises(ConfigurationError, match=r"num_samples=5 is more than the 4 training examples .*held out"):
        plan_experiment(experiment(*settings, "fish_tuning.num_samples=5", "training.learning_rates=[0.1, 0.01]"))
