"""Code of the user's that experiments name: selections, scores, tasks and PEFT methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.arm_names import ArmName
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.extensions import load_extensions
from fish_tuning.experiments.config.task_kinds import TASKS
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.runner import run_experiment
from fish_tuning.masks.selections import SELECTIONS
from fish_tuning.peft_methods import PEFT_METHODS
from fish_tuning.scores.named import SCORES, Evidence

MINE = """
from fish_tuning import PeftMethod, register_peft_method, register_score, register_selection
from fish_tuning.experiments.data.tasks import TextClassification, register_task

@register_selection("halfway")
def middle(scores):
    return -(scores - scores.median()).abs()

@register_score("spread", needs=("mean_gradient", "mean_square"))
def spread(evidence):
    return (evidence.mean_square - evidence.mean_gradient.square()).clamp(min=0) / evidence.batch_size

@register_task
class Reviews(TextClassification):
    kind = "reviews"

    def compute_metrics(self, prediction):
        return super().compute_metrics(prediction)

register_peft_method("rslora", PeftMethod("LORA", arguments={"use_rslora": True}, takes_init_lora_weights=True))
"""


@pytest.fixture(autouse=True)
def _registries_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (SELECTIONS, SCORES, TASKS, PEFT_METHODS):
        monkeypatch.setattr(registry, "_members", dict(registry))


@pytest.fixture
def extension(tmp_path: Path) -> str:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return str(file)


def test_an_experiment_names_what_an_extension_brings(
    extension: str, experiment: Callable[..., ExperimentConfig]
) -> None:
    load_extensions([extension])
    config = experiment(
        "peft.method=rslora", "fish_tuning.methods_to_run=[rslora, rslora-halfway]", "dataset.task=reviews"
    )
    plan = plan_experiment(config)
    assert plan.task.kind == "reviews"
    assert [run.status for run in run_experiment(config, plan)] == ["ok", "ok"]


def test_a_score_of_an_extension_judges_the_entries_for_the_batch_of_training(
    extension: str, experiment: Callable[..., ExperimentConfig]
) -> None:
    load_extensions([extension])
    spread, seen = SCORES["spread"], []

    def watched(evidence: Evidence) -> object:
        seen.append(evidence)
        return spread.function(evidence)

    SCORES.register("spread")(replace(spread, function=watched))  # type: ignore[arg-type]
    config = experiment(
        "fish_tuning.methods_to_run=[lora-fish]",
        "fish_tuning.score=spread",
        "training.args_override.per_device_train_batch_size=4",
        "training.args_override.gradient_accumulation_steps=3",
    )
    assert [run.status for run in run_experiment(config, plan_experiment(config))] == ["ok"]
    assert {evidence.batch_size for evidence in seen} == {12}
    assert all(evidence.num_samples == config.fish_tuning.num_samples for evidence in seen)


def test_without_the_extension_its_names_are_unknown(experiment: Callable[..., ExperimentConfig]) -> None:
    with pytest.raises(ConfigurationError, match="'lora-halfway' is no arm"):
        experiment("fish_tuning.methods_to_run=[lora, lora-halfway]")
    with pytest.raises(ConfigurationError, match=r"dataset\.task='reviews': must be text_classification"):
        experiment("dataset.task=reviews")
    with pytest.raises(ConfigurationError, match="must be one of gain"):
        experiment("fish_tuning.score=spread")
    # a report of its runs needs no extension
    assert ArmName.parse("lora-halfway").selection is not None
    assert ArmName.parse("lora-halfway").baseline == "lora"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.py", "there is no such file"),
        ("no_such_module_at_all", "ModuleNotFoundError"),
        ("./broken.yaml", "a file must be one of Python"),
        ("broken.py", "ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_imported_is_told(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(ConfigurationError, match=rf"--extension {name}: .*{message}"):
        load_extensions([name])
