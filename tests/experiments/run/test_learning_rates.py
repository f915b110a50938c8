"""Learning rates chosen on a part of the training set, early stopping, and work shared between processes."""

from __future__ import annotations

import errno
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.records.run_record import ArmPlan
from fish_tuning.experiments.run import arm as arms
from fish_tuning.experiments.run import trainings
from fish_tuning.experiments.run.context import Context
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.runner import run_experiment
from fish_tuning.experiments.run.shards import Shard, parse_shard
from fish_tuning.experiments.run.trainers import Diverged
from fish_tuning.files.sealed_json import read_sealed

MakeExperiment = Callable[..., ExperimentConfig]
TWO_ARMS = "fish_tuning.methods_to_run=[lora, lora-fish]"


def test_each_arm_gets_the_rate_that_is_best_on_held_out_training_examples(
    experiment: MakeExperiment, tmp_path: Path
) -> None:
    config = experiment(TWO_ARMS, "training.learning_rates=[1.0e-9, 0.01]")
    plan = plan_experiment(config)
    records = run_experiment(config, plan)
    for record in records:
        trials, _ = read_sealed(tmp_path / "results" / "selection" / f"{record.arm}.json")
        best = max(trials, key=lambda rate: trials[rate]["value"])
        assert record.learning_rate == float(best)
    facts = json.loads((tmp_path / "results" / "results.json").read_text())["facts"]
    assert facts["learning_rates"] == {record.arm: record.learning_rate for record in records}
    assert "learning_rates" not in plan.facts
    text = (tmp_path / "results" / "results.md").read_text()
    assert "was chosen on a fifth of the training set, with the first seed, among 1e-09, 0.01: lora " in text


def test_trials_are_made_once_and_see_no_validation_example(
    experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(TWO_ARMS, "training.learning_rates=[0.001, 0.01]", "seeds=[1, 2]")
    sizes = []
    run = trainings.run_arm

    def watched(context: Context, arm: ArmPlan, seed: int, *rest: Any) -> Any:
        if context.is_trial:
            sizes.append((len(context.data.train), len(context.data.validation), seed))
        return run(context, arm, seed, *rest)

    monkeypatch.setattr(trainings, "run_arm", watched)
    run_experiment(config, plan_experiment(config))
    assert sizes == [(38, 10, 1)] * 4  # of 48 training examples; two arms, two rates
    sizes.clear()
    run_experiment(config, plan_experiment(config))
    assert not sizes


def test_rates_are_tried_with_several_seeds(
    experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first seed alone would take 0.01, the mean takes 0.001; 0.1 diverges with the second and is tried no more."""
    losses = {
        (0.001, 1): 0.5, (0.001, 2): 0.5, (0.001, 3): 0.6,
        (0.01, 1): 0.3, (0.01, 2): 0.7, (0.01, 3): 0.8,
        (0.1, 1): 0.1, (0.1, 2): None,
    }  # fmt: skip
    tried = []
    run = trainings.run_arm

    def watched(context: Context, arm: ArmPlan, seed: int, known: Any, rate: Any) -> Any:
        record, calibration = run(context, arm, seed, known, rate)
        if not context.is_trial:
            return record, calibration
        tried.append((rate, seed))
        if (loss := losses[rate, seed]) is None:
            raise Diverged("not finite")
        return replace(record, metrics={**record.metrics, "loss": loss}), calibration

    monkeypatch.setattr(trainings, "run_arm", watched)
    settings = [
        "fish_tuning.methods_to_run=[lora]",
        "training.learning_rates=[0.001, 0.01, 0.1]",
        "training.choose_by=loss",
    ]
    config = experiment(*settings, "seeds=[1, 2, 3]", "training.trial_seeds=3")
    records = run_experiment(config, plan_experiment(config))
    assert sorted(tried) == sorted(losses)
    assert {record.learning_rate for record in records} == {0.001}
    assert "with the first 3 seeds, among" in (tmp_path / "results" / "results.md").read_text()
    tried.clear()
    assert run_experiment(config, plan_experiment(config)) == records
    config = experiment(*settings, "seeds=[1, 2, 3]")  # which needs no trial that was not made
    assert {record.learning_rate for record in run_experiment(config, plan_experiment(config))} == {0.1}
    assert not tried
    with pytest.raises(ConfigurationError, match=r"training\.trial_seeds=3 is more than there are seeds, 2"):
        experiment("seeds=[1, 2]", "training.trial_seeds=3")


@pytest.mark.parametrize(
    ("losses", "chosen"), [({0.01: 0.5, 0.001: 0.4, 0.1: 0.6}, 0.001), ({0.01: 0.5, 0.001: 0.7, 0.1: 0.5}, 0.01)]
)
def test_of_equal_rates_the_loss_decides_then_the_smaller_one(
    experiment: MakeExperiment,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    losses: dict[float, float],
    chosen: float,
) -> None:
    run = trainings.run_arm

    def watched(context: Context, arm: ArmPlan, seed: int, known: Any, rate: Any) -> Any:
        record, calibration = run(context, arm, seed, known, rate)
        if context.is_trial:
            record = replace(record, value=0.5, metrics={**record.metrics, "loss": losses[rate]})
        return record, calibration

    monkeypatch.setattr(trainings, "run_arm", watched)
    config = experiment("fish_tuning.methods_to_run=[lora]", "training.learning_rates=[0.1, 0.01, 0.001]")
    (record,) = run_experiment(config, plan_experiment(config))
    assert record.learning_rate == chosen
    text = (tmp_path / "results" / "results.md").read_text()
    assert "the loss, then the smaller rate decided: lora 0.001, 0.01, 0.1." in text


def test_a_rate_that_fails_is_not_chosen_and_an_arm_without_one_fails(experiment: MakeExperiment) -> None:
    config = experiment("fish_tuning.methods_to_run=[lora]", "training.learning_rates=[1.0e+30, 0.01]")
    (record,) = run_experiment(config, plan_experiment(config))
    assert (record.status, record.learning_rate) == ("ok", 0.01)
    config = experiment("fish_tuning.methods_to_run=[lora]", "training.learning_rates=[1.0e+30, 2.0e+30]")
    (record,) = run_experiment(config, plan_experiment(config))
    assert record.status == "failed"
    assert "None of training.learning_rates worked for lora: 1e+30: After" in str(record.error)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("it broke")])
def test_an_error_is_no_verdict_about_a_rate(
    experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    config = experiment("fish_tuning.methods_to_run=[lora]", "training.learning_rates=[0.001, 0.01]")
    run = trainings.run_arm

    def fails(context: Context, arm: ArmPlan, seed: int, calibration: Any, rate: float) -> Any:
        if rate == 0.01:
            raise error
        return run(context, arm, seed, calibration, rate)

    with monkeypatch.context() as patch:
        patch.setattr(trainings, "run_arm", fails)
        (record,) = run_experiment(config, plan_experiment(config))
    assert record.status == "failed"
    assert f"The trial of learning rate 0.01 for lora failed: {type(error).__name__}: {error}" in (record.error or "")
    assert read_sealed(tmp_path / "results/selection/lora.json")[0].keys() == {"0.001"}
    (record,) = run_experiment(config, plan_experiment(config))
    assert record.status == "ok"


def test_a_full_disk_in_a_trial_stops_everything(experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    config = experiment("fish_tuning.methods_to_run=[lora]", "training.learning_rates=[0.001, 0.01]")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainings, "run_arm", full)
    with pytest.raises(OSError, match="No space left"):
        run_experiment(config, plan_experiment(config))


def test_a_failed_choice_is_no_run_of_the_arguments_own_rate(
    experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ["fish_tuning.methods_to_run=[lora]", "training.args_override.learning_rate=0.001"]
    config = experiment(*only)
    run_experiment(config, plan_experiment(config))
    config = experiment(*only, "training.learning_rates=[0.5, 0.6]")

    def fails(*_: object) -> None:
        raise RuntimeError("it broke")

    monkeypatch.setattr(trainings, "run_arm", fails)
    (record,) = run_experiment(config, plan_experiment(config))
    assert record.status == "failed"


def test_calibration_must_fit_into_what_is_left(experiment: MakeExperiment) -> None:
    with pytest.raises(ConfigurationError, match="more than the 38 training examples that are left when 20%"):
        plan_experiment(experiment("training.learning_rates=[0.1, 0.01]", "fish_tuning.num_samples=39"))


def test_early_stopping_reports_the_best_epoch(experiment: MakeExperiment, tmp_path: Path) -> None:
    config = experiment(
        TWO_ARMS, "training.early_stopping_patience=1", "training.args_override.num_train_epochs=6",
        "training.args_override.learning_rate=0.05",
    )  # fmt: skip
    records = run_experiment(config, plan_experiment(config))
    assert [record.status for record in records] == ["ok", "ok"], records
    assert not list((tmp_path / "results").glob("checkpoints/*"))
    assert "Early stopping" in (tmp_path / "results" / "results.md").read_text()


def test_the_best_epoch_is_what_is_evaluated(experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    histories = []
    evaluate = arms.evaluate

    def watched(context: Context, trainer: Trainer) -> dict[str, float]:
        found = evaluate(context, trainer)
        histories.append((found["loss"], [e for e in trainer.state.log_history if "eval_loss" in e], trainer.state))
        return found

    monkeypatch.setattr(arms, "evaluate", watched)
    config = experiment(
        TWO_ARMS, "training.early_stopping_patience=1", "training.args_override.num_train_epochs=6",
        "training.args_override.learning_rate=0.05",
    )  # fmt: skip
    run_experiment(config, plan_experiment(config))
    for loss, log, state in histories:
        best = next(entry for entry in log if entry["eval_accuracy"] == state.best_metric)
        assert loss == pytest.approx(best["eval_loss"], rel=1e-5)


def test_shards_share_the_runs_and_the_last_one_reports_all(experiment: MakeExperiment) -> None:
    config = experiment(TWO_ARMS, "seeds=[1, 2]")
    done: list[tuple[str, int]] = []

    def run(number: int) -> list[tuple[str, int]]:
        done.clear()
        records = run_experiment(
            config, plan_experiment(config), lambda record, known: done.append((record.arm, record.seed)),
            Shard(number, 2),
        )  # fmt: skip
        return [(record.arm, record.seed) for record in records]

    assert run(1) == done == [("lora", 1), ("lora", 2)]
    assert len(run(2)) == 4
    assert done == [("lora-fish", 1), ("lora-fish", 2)]


def test_shards_are_written_as_a_fraction() -> None:
    assert (parse_shard(None), parse_shard("2/4")) == (Shard(1, 1), Shard(2, 4))
    for wrong in ("0/2", "3/2", "2", "a/b", "1/-2"):
        with pytest.raises(ConfigurationError, match=f"--shard {wrong}: must be I/N"):
            parse_shard(wrong)


def _work(config: ExperimentConfig, queue: multiprocessing.Queue[tuple[str, int, bool]]) -> None:
    import torch

    torch.set_num_threads(1)
    run_experiment(config, plan_experiment(config), lambda record, known: queue.put((record.arm, record.seed, known)))


def test_what_failed_since_the_work_began_is_not_tried_again(
    experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment("fish_tuning.methods_to_run=[lora]")
    plan, tried = plan_experiment(config), []

    def fails(*arguments: object) -> None:
        tried.append(arguments)
        raise RuntimeError("it broke")

    monkeypatch.setattr(trainings, "run_arm", fails)
    began = time.time() - 1
    for since in (began, began, None):
        (record,) = run_experiment(config, plan, since=since)
        assert record.status == "failed"
    assert len(tried) == 2  # at first, and in the later session


@pytest.mark.slow
def test_two_processes_in_one_folder_do_each_run_once(experiment: MakeExperiment) -> None:
    config = experiment("seeds=[1, 2]")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_work, args=(config, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    told = [queue.get(timeout=120) for _ in range(20)]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    done = [(arm, seed) for arm, seed, known in told if not known]
    assert len(done) == len(set(done)) == 10
