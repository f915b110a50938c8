"""Arms by name, and the arms of each protocol."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from folders import write_bert

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.arm_names import ArmName, Selection, Variant, baseline_of
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.loading import load_experiment
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.runner import run_experiment

MakeExperiment = Callable[..., ExperimentConfig]


@pytest.mark.parametrize(
    ("text", "parts", "baseline"),
    [
        ("lora", ("lora", "", ""), "lora"),
        ("prefix_tuning-fish-rand", ("prefix_tuning", "fish-rand", ""), "prefix_tuning"),
        ("lora-fish@0.1", ("lora", "fish", "0.1"), "lora"),
        ("dora-fish-rev@top2", ("dora", "fish-rev", "top2"), "dora@top2"),
        ("dora@top2", ("dora", "", "top2"), "dora@top2"),
        ("head", ("head", "", ""), "head"),
    ],
)
def test_names_and_their_parts(text: str, parts: tuple[str, str, str], baseline: str) -> None:
    assert ArmName.parse(text) == ArmName(*parts)
    assert str(ArmName(*parts)) == text
    assert baseline_of(text) == baseline


def test_selections() -> None:
    assert ArmName.parse("lora@top1").selection is None
    assert ArmName.parse("lora-fish-rand@0.5").selection == Selection("rand")
    assert ArmName.parse("unipelt-fish-quota").selection == Selection("fish", quotas=True)
    assert ArmName.parse("lora-gain@n12").selection == Selection("fish", score="gain")


def test_an_arm_may_name_its_score(experiment: MakeExperiment) -> None:
    config = experiment(
        "fish_tuning.methods_to_run=[lora-fish, lora-gain, lora-fish-rand]", "fish_tuning.num_samples=5"
    )
    choices = [config.choice_of_arm(arm) for arm in config.arms]
    assert [choice.score for choice in choices] == ["fisher", "gain", "fisher"]
    assert {choice.num_samples for choice in choices} == {5}
    assert plan_experiment(config).facts["scores"] == {"lora": "fisher, gain of 5 examples"}
    with pytest.raises(ConfigurationError, match="Did you mean 'lora-gain'"):
        experiment("fish_tuning.methods_to_run=[lora-gian]")


def test_fixed_layers_keeps_shares_of_the_whole_adapter(experiment: MakeExperiment) -> None:
    config = experiment("protocol=fixed_layers", "fish_tuning.keep_ratio=[0.5, 0.01]")
    assert config.arms == [
        "lora", "lora-fish@0.5", "lora-fish-rand@0.5", "lora-fish-rev@0.5",
        "lora-fish@0.01", "lora-fish-rand@0.01", "lora-fish-rev@0.01", "head",
    ]  # fmt: skip
    plan = {arm.arm: arm for arm in plan_experiment(config).arms}
    pool, head = 2 * 3 * 4 * (16 + 16), 2 * 16 + 2
    assert plan["lora"].kept == pool
    assert (plan["lora-fish@0.5"].pool, plan["lora-fish@0.5"].kept) == (pool, pool // 2)
    assert plan["lora-fish-rev@0.01"].trainable_parameters == round(0.01 * pool) + head


@pytest.mark.parametrize("method", ["lora", "ia3", "serial_adapter"])
def test_fixed_budget_matches_the_top_layers(experiment: MakeExperiment, method: str) -> None:
    config = experiment(
        "protocol=fixed_budget", f"peft.method={method}", "lora.fish_rank=1", "fish_tuning.top_layers=[1, 2]",
        "fish_tuning.pool_layers=2", f"fish_tuning.methods_to_run=[{method}, {method}-fish]",
    )  # fmt: skip
    assert config.arms == [f"{method}@top1", f"{method}-fish@top1", f"{method}@top2", f"{method}-fish@top2"]
    assert config.variant_of(f"{method}-fish@top1") == Variant(top_layers=2)
    one, fish, two, all_of_it = plan_experiment(config).arms
    assert one.trainable_parameters == fish.trainable_parameters
    assert two.kept == all_of_it.kept == fish.pool == 2 * one.kept


def test_fixed_budget_names_layers_from_the_output(experiment: MakeExperiment) -> None:
    config = experiment("protocol=fixed_budget", "fish_tuning.top_layers=[1]", "fish_tuning.pool_layers=2")
    assert plan_experiment(config).arms[0].settings["layers_to_transform"] == [1]
    assert config.arms.count("head") == 1  # whatever the budgets


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fish_tuning.pool_layers=5"], "5 layers were asked for, BertForSequenceClassification has 2"),
        (["fish_tuning.pool_layers=2", "peft.method=prefix_tuning"], "adapts all layers at once"),
    ],
)
def test_layers_that_are_not_there_are_told(experiment: MakeExperiment, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        plan_experiment(experiment("protocol=fixed_budget", "fish_tuning.top_layers=[1]", *overrides))


def test_the_papers_smallest_budget_comes_out(tmp_path: Path, sentences_folder: Path) -> None:
    """6,146 parameters, 0.0057 % of BERT-base: LoRA r=1 on the top layer's query, key and value, and the head."""
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12}
    folder = write_bert(tmp_path / "bert", weights=False, **sizes)
    config = load_experiment(
        "paper-fixed-budget",
        [f"model.name={folder}", f"dataset=[{{load_args: [{sentences_folder}]}}]", "peft=[{method: lora}]",
         "fish_tuning.num_samples=8", "fish_tuning.methods_to_run=[lora, lora-fish]"],
    )  # fmt: skip
    plan = {arm.arm: arm for arm in plan_experiment(config).arms}
    assert plan["lora@top1"].trainable_parameters == plan["lora-fish@top1"].trainable_parameters == 6146
    assert plan["lora-fish@top1"].pool == 5 * 4608


def test_both_protocols_run(experiment: MakeExperiment) -> None:
    layers = experiment(
        "protocol=fixed_layers", "fish_tuning.keep_ratio=[0.5, 0.1]", "fish_tuning.methods_to_run=[lora, lora-fish]"
    )
    budget = experiment("protocol=fixed_budget", "fish_tuning.top_layers=[1]", "fish_tuning.pool_layers=2")
    for config in (layers, budget):
        plan = plan_experiment(config)
        records = run_experiment(config, plan)
        assert {record.status for record in records} == {"ok"}, [record.error for record in records]
        assert [r.trainable_parameters for r in records] == [arm.trainable_parameters for arm in plan.arms]
