"""The command line with the planner and the runner faked: exit codes, messages, and how little --help imports."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import fish_tuning
from fish_tuning.cli import app
from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.records.run_record import ArmPlan, RunRecord
from fish_tuning.experiments.report.results_files import write_report

PLAN = SimpleNamespace(
    quantization=None,
    arms=[
        ArmPlan("lora", "lora", None, "r 2", {}, 3397, 3072, 3072, 325),
        ArmPlan("lora-fish", "lora", "fish", "r 16", {}, 3397, 24576, 3072, 325),
    ],
    facts={"task": "fake", "train_examples": 300},
    notes=["a note of the plan"],
)
HEAVY = ("torch", "transformers", "peft", "datasets", "yaml", "scipy", "matplotlib", "numpy", "sklearn")


def record(arm: str, seed: int, value: float | None) -> RunRecord:
    if value is None:
        return RunRecord(arm, seed, "failed", "accuracy", error="RuntimeError: it broke")
    return RunRecord(arm, seed, "ok", "accuracy", value=value, trainable_parameters=3397, train_seconds=1.0)


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Run the command with a planner and a runner that do what they are told."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str, runs: list[RunRecord] | BaseException = [], plan: Any = PLAN) -> Result:  # noqa: B006
        def plan_experiment(config: Any) -> Any:
            if isinstance(plan, BaseException):
                raise plan
            return plan

        def run_experiment(
            config: Any, plan: Any, on_run: Callable[[RunRecord, bool], None], shard: Any, since: float
        ) -> list[RunRecord]:
            if isinstance(runs, BaseException):
                raise runs
            for run in runs:
                on_run(run, False)
            write_report(config, plan.facts, runs, Path(config.training.output_dir))
            return runs

        for name, function in (("run.plan", plan_experiment), ("run.runner", run_experiment)):
            module = ModuleType(f"fish_tuning.experiments.{name}")
            setattr(module, function.__name__, function)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return CliRunner().invoke(app, list(arguments), catch_exceptions=False)

    return invoke


def test_run_prints_table_notes_files_and_conclusion(invoke: Callable[..., Result], tmp_path: Path) -> None:
    arms = {"lora": 0.5, "lora-fish": 0.6, "lora-fish-rand": 0.4, "lora-fish-rev": 0.3, "head": 0.2}
    runs = [record(arm, seed, value + seed / 1000) for arm, value in arms.items() for seed in (1, 2, 3)]
    result = invoke("run", "digits", "seeds=[1,2,3]", runs=runs)
    assert result.exit_code == 0
    for text in (
        "lora-fish, seed 2: accuracy 0.6020 (1.0 s)",
        "init_lora_weights true, scored after 20 warm-up steps",
        "0.502 [0.500, 0.504]",
        "note: a note of the plan",
        "results/digits/results.md, results/digits/metric.png",
        "lora-fish reaches accuracy 0.602",
    ):
        assert text in result.output
    assert (tmp_path / "results/digits/results.json").is_file()


def test_a_failed_run_is_exit_code_1(invoke: Callable[..., Result]) -> None:
    result = invoke("run", "digits", runs=[record("lora", 1, 0.5), record("lora-fish", 1, None)])
    assert result.exit_code == 1
    assert "lora-fish, seed 1: failed: RuntimeError: it broke" in result.output


def test_dry_run_shows_the_plan_and_runs_nothing(invoke: Callable[..., Result], tmp_path: Path) -> None:
    result = invoke("run", "digits", "--dry-run", runs=AssertionError("nothing may run"))
    assert result.exit_code == 0
    for text in ("lora-fish", "24,576", "12.5%", "3,397", "train examples: 300", "note: a note of the plan"):
        assert text in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "digitz"], "Did you mean 'digits'?"),
        (["run", "digits", "lora.fish_rank=0"], "lora.fish_rank=0: must be a whole number from 1."),
        (["run", "digits", "oops"], "is no override"),
        (["run"], "Missing argument"),
        (["run", "digits", "--wet-run"], "--wet-run"),
    ],
)
def test_wrong_use_is_exit_code_2_without_a_traceback(
    invoke: Callable[..., Result], arguments: list[str], expected: str
) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert "Traceback" not in result.output


def test_what_the_plan_refuses_is_exit_code_2(invoke: Callable[..., Result]) -> None:
    result = invoke("run", "digits", plan=ConfigurationError("no such column"))
    assert (result.exit_code, result.stderr) == (2, "error: no such column\n")


def test_an_output_folder_that_cannot_be_made_is_exit_code_2(invoke: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = invoke("run", "digits", "training.output_dir=file/below")
    assert result.exit_code == 2
    assert "training.output_dir" in result.stderr


def test_interrupting_is_exit_code_130_and_says_what_is_kept(invoke: Callable[..., Result]) -> None:
    result = invoke("run", "digits", runs=KeyboardInterrupt())
    assert result.exit_code == 130
    assert "finished runs are kept in results/digits" in result.stderr
    assert invoke("run", "digits", plan=KeyboardInterrupt()).exit_code == 130


def test_configs_lists_the_shipped_experiments() -> None:
    result = CliRunner().invoke(app, ["configs"])
    assert result.exit_code == 0
    lines = dict(line.split("  ", 1) for line in result.output.splitlines())
    assert lines["digits"].strip()


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"fish-tuning {fish_tuning.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["plan", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom fish_tuning.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit: pass\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    assert done.stdout.endswith("heavy: []\n")


def test_a_wrong_key_is_told_without_importing_torch() -> None:
    code = (
        "import sys\nfrom fish_tuning.cli import run_command\n"
        "code = run_command('digits', ['training.args_override.learning_rat=1'])\n"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"


def test_each_data_set_is_an_experiment(invoke: Callable[..., Result]) -> None:
    two = "dataset=[{load_args: [one/cola]}, {load_args: [two/rte], max_train_samples: 300}]"
    done = invoke("run", "digits", two, "model.name=digits-vit", "--shard", "1/2", "--dry-run")
    assert done.exit_code == 0
    assert "digits-cola: what each arm would train" in done.output
    assert "digits-rte: what each arm would train" in done.output


def test_a_full_disk_is_told(invoke: Callable[..., Result]) -> None:
    done = invoke("run", "digits", runs=OSError(errno.ENOSPC, "No space left on device"))
    assert done.exit_code == 1
    assert "the disk is full" in done.output
    assert "What is finished is kept" in done.output


def test_a_wrong_engine_is_told(invoke: Callable[..., Result]) -> None:
    done = invoke("run", "digits", "--engine", "slurm")
    assert done.exit_code == 2
    assert "--engine slurm: allowed are here, ray" in done.output


def test_workers_without_an_engine_are_refused(invoke: Callable[..., Result]) -> None:
    done = invoke("run", "digits", "--workers", "2")
    assert done.exit_code == 2
    assert "--workers 2: the engine here has none" in done.stderr


def test_ray_gives_whole_runs_and_a_launch_trains_them_together(
    invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    done = invoke("run", "digits", "--engine", "ray", plan=AssertionError("nothing may be planned"))
    assert done.exit_code == 2
    assert "--engine ray: this is process 0 of 2, which torchrun or accelerate has started" in done.stderr


def test_a_wrong_file_is_told_once_a_host(invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        done = invoke("run", "no-such-file")
        assert done.exit_code == 2
        assert bool(done.stderr) == (rank == "0")


def test_a_wrong_shard_is_told(invoke: Callable[..., Result]) -> None:
    done = invoke("run", "digits", "--shard", "5/2")
    assert done.exit_code == 2
    assert "--shard 5/2: must be I/N" in done.output


def test_script_does_the_same() -> None:
    script = Path(__file__).parents[1] / "scripts" / "run_experiment.py"
    command = [sys.executable, str(script), "--config", "digits", "lora.fish_rnk=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Did you mean 'lora.fish_rank'?" in done.stderr
