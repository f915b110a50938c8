"""A method several times under names of its own, and arms of a given number of entries."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.arm_names import ArmName
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.records.run_keys import run_keys
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.runner import run_experiment

MakeExperiment = Callable[..., ExperimentConfig]

VALUE = "{name: value1, method: lora, args: {r: 1, target_modules: [value]}}"  # 2 layers x 32 entries
POOL = "{name: pool, method: lora, args: {r: 4}, fish_tuning: {score: gain, num_samples: 4}}"
NAMED = (
    "protocol=fixed_count",
    f"peft=[{VALUE}, {POOL}]",
    "fish_tuning.methods_to_run=[value1, pool-fish, pool-fish-rand]",
    "fish_tuning.kept_parameters=[64, 10]",
)


def test_arms_are_called_by_name_and_count(experiment: MakeExperiment) -> None:
    config = experiment(*NAMED)
    masked = [f"pool-{choice}@n{count}" for count in (64, 10) for choice in ("fish", "fish-rand")]
    assert config.arms == ["value1", *masked]
    assert ArmName.parse("pool-fish@n64").count == 64
    assert ArmName.parse("pool-fish@0.64").count is None
    plan = {arm.arm: arm for arm in plan_experiment(config).arms}
    assert {name: (arm.kept, arm.pool, arm.dense) for name, arm in plan.items()} == {
        "value1": (64, 64, 34),
        **{name: (64 if "n64" in name else 10, 768, 34) for name in masked},
    }
    assert {arm.method for arm in plan.values()} == {"lora"}


def test_each_has_its_own_choice(experiment: MakeExperiment) -> None:
    config = experiment(*NAMED, "fish_tuning.score=fisher", "fish_tuning.warmup_steps=3")
    value, pool = config.peft
    assert (config.choice_of(value).score, config.choice_of(pool).score) == ("fisher", "gain")
    assert (config.choice_of(value).num_samples, config.choice_of(pool).num_samples) == (8, 4)
    assert config.warmup_steps(pool) == 3
    facts = plan_experiment(config).facts
    assert facts["scores"] == {"pool": "gain of 4 examples"}
    assert facts["adapters"] == {"value1": "r 1", "pool": "r 4"}


def test_what_is_written_is_read_again_as_the_same(experiment: MakeExperiment) -> None:
    config = experiment(*NAMED, "fish_tuning.num_samples=7")
    again = ExperimentConfig(**config.model_dump(mode="json"))
    assert [again.choice_of(section) for section in again.peft] == [
        config.choice_of(section) for section in config.peft
    ]
    assert [config.choice_of(section).num_samples for section in again.peft] == [7, 4]


def test_each_has_its_own_learning_rates(experiment: MakeExperiment) -> None:
    own = VALUE.replace("}}", "}, learning_rates: [0.5, 0.25]}")
    config = experiment(*NAMED, f"peft=[{own}, {POOL}]", "training.learning_rates=[0.1]")
    assert [config.learning_rates_of(section) for section in config.peft] == [[0.5, 0.25], [0.1]]


def test_a_name_is_no_setting(experiment: MakeExperiment) -> None:
    """The same arm under another name is the same run; another score is another."""
    one, renamed = (experiment(*NAMED), experiment(*(key.replace("pool", "other") for key in NAMED)))
    keys = [run_keys(config, plan_experiment(config).arms[1], {}, {}).run for config in (one, renamed)]
    assert keys[0] == keys[1]
    rescored = experiment(*(key.replace("gain", "gradient") for key in NAMED))
    assert run_keys(rescored, plan_experiment(rescored).arms[1], {}, {}).run != keys[0]


def test_they_run_side_by_side(experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    config = experiment(*NAMED, "training.learning_rates=[0.001, 0.01]", "training.choose_by=loss")
    plan = plan_experiment(config)
    records = run_experiment(config, plan)
    assert {record.status for record in records} == {"ok"}, [record.error for record in records]
    assert [record.kept_parameters for record in records] == [64, 64, 64, 10, 10]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["fish_tuning.kept_parameters=[]"], "fish_tuning.kept_parameters is missing"),
        (["fish_tuning.kept_parameters=[0]"], "fish_tuning.kept_parameters"),
        (["fish_tuning.kept_parameters=[5, 5]"], "holds 5 twice"),
        ([f"peft=[{VALUE}, {VALUE}]"], "holds 'value1' twice"),
        ([f"peft=[{VALUE.replace('value1', 'Value-1')}]"], "what its arms are called"),
        ([f"peft=[{VALUE.replace('value1', 'head')}]"], "is the arm of the head alone"),
        ([f"peft=[{POOL.replace('gain', 'gian')}]"], "Did you mean 'gain'"),
        ([f"peft=[{POOL.replace('num_samples', 'number')}]"], "peft.fish_tuning.number is not known"),
        (["fish_tuning.methods_to_run=[values1]"], "Did you mean 'value1'"),
    ],
)
def test_what_cannot_be_meant_is_refused(experiment: MakeExperiment, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        experiment(*NAMED, *changes)


def test_a_count_beyond_the_pool_is_refused_before_anything_runs(experiment: MakeExperiment) -> None:
    with pytest.raises(ConfigurationError, match=r"kept_parameters=769: the pool of pool \(r 4\) has 768 entries"):
        plan_experiment(experiment(*NAMED, "fish_tuning.kept_parameters=[769]"))
    with pytest.raises(ConfigurationError, match=r"peft.pool.fish_tuning.num_samples=400 is more than"):
        plan_experiment(experiment(*(key.replace("num_samples: 4", "num_samples: 400") for key in NAMED)))


def test_dense_arms_of_other_sizes_are_told(experiment: MakeExperiment) -> None:
    plan = plan_experiment(experiment(*NAMED, "fish_tuning.kept_parameters=[32]"))
    assert any("value1 (64)" in note for note in plan.notes)
