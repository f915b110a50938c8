"""Processes of one launch that train together."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from fakes import ok
from folders import write_llama, write_sums
from processes import in_two_processes
from transformers import TrainerCallback

from fish_tuning.errors import ConfigurationError, FishTuningError, ProcessesLost
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.run import arguments, context
from fish_tuning.experiments.run import together as together_module
from fish_tuning.experiments.run.context import make_context
from fish_tuning.experiments.run.launch import ALONE, Launch, this_launch
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.runner import run_experiment
from fish_tuning.experiments.run.together import Together
from fish_tuning.experiments.run.trainings import Order, Train

FIRST, SECOND = Order("lora", 1), Order("lora-fish", 1, 0.5, is_trial=True)


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together_module, "GRACE_SECONDS", 0.3)


def in_two_threads(
    trains: tuple[Train, Train], *orders: Order, forget: Callable[[int], None] = lambda rank: None
) -> tuple[list[RunRecord | Exception], Any]:
    """What process 0 gets of each order, and what process 1 ends with."""
    store = dist.HashStore()  # type: ignore[attr-defined]

    def lead() -> list[RunRecord | Exception]:
        leader, results = Together(trains[0], Launch(0, 2), store, lambda: forget(0)), []
        for order in orders:
            try:
                results.append(leader(order))
            except (FishTuningError, ArithmeticError) as error:
                results.append(error)
        leader.close()
        return results

    def follow() -> Exception | None:
        try:
            Together(trains[1], Launch(1, 2, 1), store, lambda: forget(1)).follow()
        except ProcessesLost as error:
            return error
        return None

    with ThreadPoolExecutor(2) as pool:
        led, followed = pool.submit(lead), pool.submit(follow)
        return led.result(timeout=20), followed.result(timeout=20)


def noting(orders: list[Order], failing: Callable[[Order], bool] = lambda order: False) -> Train:
    def train(order: Order) -> RunRecord:
        orders.append(order)
        if failing(order):
            raise ArithmeticError("it broke")
        return ok(order.arm, order.seed, 0.5)

    return train


def test_all_do_the_same_trainings_in_the_same_order() -> None:
    done: tuple[list[Order], list[Order]] = [], []
    results, end = in_two_threads((noting(done[0]), noting(done[1])), FIRST, SECOND)
    assert [result.arm for result in results if isinstance(result, RunRecord)] == ["lora", "lora-fish"]
    assert done[0] == done[1] == [FIRST, SECOND]
    assert end is None


def test_what_fails_in_all_has_failed_and_the_next_follows() -> None:
    done: tuple[list[Order], list[Order]] = [], []

    def first(order: Order) -> bool:
        return order == FIRST

    results, end = in_two_threads((noting(done[0], first), noting(done[1], first)), FIRST, SECOND)
    assert isinstance(results[0], ArithmeticError), "as it was raised: what is tried may be judged by its kind"
    assert isinstance(results[1], RunRecord)
    assert done[0] == done[1] == [FIRST, SECOND]
    assert end is None


def test_what_fails_elsewhere_is_told_with_its_process() -> None:
    forgotten: list[int] = []
    trains = noting([]), noting([], lambda order: order == FIRST)
    results, end = in_two_threads(trains, FIRST, SECOND, forget=forgotten.append)
    assert sorted(forgotten) == [0, 1], "or one would score where the other has kept its scores"
    assert str(results[0]) == "Process 1 of 2: ArithmeticError: it broke"
    assert isinstance(results[1], RunRecord)
    assert end is None


@pytest.mark.parametrize("failing", [0, 1])
def test_who_waits_for_one_that_failed_ends_with_its_error(failing: int) -> None:
    """As gloo has it: the wait breaks once the other process has ended."""
    gone: list[bool] = []

    def fails(order: Order) -> RunRecord:
        raise ArithmeticError("out of memory")

    def waits(order: Order) -> RunRecord:
        while not gone:
            time.sleep(0.01)
        raise ConnectionError("closed by peer")

    store = dist.HashStore()  # type: ignore[attr-defined]
    trains = (fails, waits) if failing == 0 else (waits, fails)

    def lead() -> Exception:
        try:
            Together(trains[0], Launch(0, 2), store)(FIRST)
        except ProcessesLost as error:
            gone.append(True)
            return error
        raise AssertionError

    def follow() -> Exception:
        try:
            Together(trains[1], Launch(1, 2, 1), store).follow()
        except ProcessesLost as error:
            gone.append(True)
            return error
        raise AssertionError

    with ThreadPoolExecutor(2) as pool:
        for end in (pool.submit(lead), pool.submit(follow)):
            text = str(end.result(timeout=20))
            assert text.startswith(
                f"Process {failing} of 2: ArithmeticError: out of memory. Not heard of since: process"
            )
            assert "the same command goes on" in text


def test_an_interruption_reaches_the_others() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]

    def interrupted(order: Order) -> RunRecord:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Together(interrupted, Launch(0, 2), store)(FIRST)
    with pytest.raises(ProcessesLost, match="process 0 of 2 was interrupted"):
        Together(noting([]), Launch(1, 2, 1), store).follow()


def test_a_store_that_is_gone_is_told() -> None:
    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise dist.DistNetworkError("Connection reset by peer")

    with pytest.raises(ProcessesLost, match="cannot be reached any more: Connection reset"):
        Together(noting([]), Launch(1, 2, 1), Gone()).follow()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ALONE),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ALONE),
        ({"WORLD_SIZE": "2"}, ALONE),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Launch(3, 4, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Launch(3, 4, 3)),
    ],
)
def test_a_launch_is_known_by_its_environment(environment: dict[str, str], expected: Launch) -> None:
    assert this_launch(environment) == expected


def test_processes_on_cpus_train_together(
    experiment: Callable[..., ExperimentConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without use_cpu transformers lets each of them train by itself."""

    def given(**values: Any) -> None:
        raise ValueError(f"use_cpu={values.get('use_cpu')}")

    config = experiment()
    del config.training.args_override["use_cpu"]
    monkeypatch.setattr(arguments, "TrainingArguments", given)
    for number, accelerator, expected in [("1", False, None), ("2", False, True), ("2", True, None)]:
        monkeypatch.setattr("torch.accelerator.is_available", lambda found=accelerator: found)
        monkeypatch.setenv("WORLD_SIZE", number)
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(ConfigurationError, match=f"use_cpu={expected}$"):
            arguments.training_arguments(config, 1, tmp_path)


KILLER = """
import os, signal
from pathlib import Path
from transformers import Trainer

step = Trainer.training_step

def training_step(self, *arguments):
    if os.environ["RANK"] == "1" and Path("{record}").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments)

Trainer.training_step = training_step
"""


def test_after_a_kill_the_same_command_goes_on(
    experiment: Callable[..., ExperimentConfig], tmp_path: Path, python_environment: dict[str, str]
) -> None:
    experiment()
    killer = tmp_path / "killer.py"
    killer.write_text(KILLER.format(record=tmp_path / "results" / "runs" / "lora-seed1.json"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arms = "fish_tuning.methods_to_run=[lora, lora-fish]"
    command = [*launcher, "-m", "fish_tuning", "run", str(tmp_path / "small.yaml"), arms]

    def launched(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, env=python_environment, check=False)

    killed = launched("--extension", str(killer))
    assert killed.returncode != 0
    assert "lora, seed 1: accuracy" in killed.stdout, killed.stderr
    again = launched()
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("(finished before)") == 1
    assert again.stdout.count("written:") == 1


@pytest.mark.parametrize(("asked", "given"), [("", False), ("average_tokens_across_devices: true, ", True)])
def test_whether_tokens_are_averaged_is_the_users_to_say(
    asked: str, given: bool, experiment: Callable[..., ExperimentConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "this_launch", lambda: Launch(0, 2))
    config = experiment(f"training.args_override={{{asked}use_cpu: true}}")
    made = make_context(config, plan_experiment(config), TrainerCallback())
    assert made.arguments(made.plan.arms[0], 1).average_tokens_across_devices is given


def run_in(rank: int, folder: Path, *configs: ExperimentConfig) -> list[dict[str, Any]]:
    """What is known of all runs that this process writes down."""
    return [asdict(record) for config in configs for record in run_experiment(config, plan_experiment(config))]


def test_two_processes_give_what_one_gives(experiment: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    llama, sums = write_llama(tmp_path / "llama"), write_sums(tmp_path / "sums")

    def configs(place: str, batch: int) -> list[ExperimentConfig]:
        size = f"training.args_override.per_device_train_batch_size={batch}"
        classes = experiment(
            "fish_tuning.methods_to_run=[lora, lora-fish]", "training.learning_rates=[1.0e-9, 0.01]", size,
            "model.config_overrides={hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}",
            f"training.output_dir={tmp_path / place / 'classes'}",
        )  # fmt: skip
        answers = experiment(
            f"model.name={llama}", f"dataset.load_args=[{sums}]", "dataset.metric=exact_match_number",
            "dataset.max_new_tokens=4", "fish_tuning.methods_to_run=[lora-fish]", size,
            "training.args_override.learning_rate=0.01", f"training.output_dir={tmp_path / place / 'sums'}",
        )  # fmt: skip
        return [classes, answers]

    together, following = in_two_processes(run_in, tmp_path, *configs("two", 6))
    alone = run_in(0, tmp_path, *configs("one", 12))
    assert following == []
    assert len(alone) == 3
    for one, two in zip(alone, together, strict=True):
        for name in ("arm", "status", "learning_rate", "trainable_parameters", "optimizer_state_bytes"):
            assert one[name] == two[name]
        assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-4)
        assert one["config_hash"] != two["config_hash"]
