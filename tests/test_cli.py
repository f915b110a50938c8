"""The command line with the planner and the runner faked: exit codes, messages, and how little --help imports."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

import fish_tuning
from fish_tuning.cli import app, application, run_command
from fish_tuning.cli.application import errors_told
from fish_tuning.errors import ConfigurationError, FisherError
from fish_tuning.experiments.config.loading import shipped_experiments
from fish_tuning.experiments.config.schema import experiment_schema
from fish_tuning.experiments.records.run_record import ArmPlan, RunRecord
from fish_tuning.experiments.report.results_files import write_report
from fish_tuning.experiments.run.facts import report_facts
from fish_tuning.experiments.run.launch import ALONE, Launch

PLAN = SimpleNamespace(
    quantization=None,
    arms=[
        ArmPlan("lora", "lora", None, "r 2", {}, 3397, 3072, 3072, 325),
        ArmPlan("lora-fish", "lora", "fish", "r 16", {}, 3397, 24576, 3072, 325),
    ],
    facts={"task": "fake", "train_examples": 300},
    notes=["a note of the plan"],
)
FINGERPRINTS = {"data_fingerprint": "ab12", "weights_fingerprint": "cd34"}
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
            config: Any,
            plan: Any,
            on_run: Callable[[RunRecord, bool], None],
            *_: Any,
            on_fingerprints: Callable[[dict[str, str]], None],
        ) -> list[RunRecord]:
            if isinstance(runs, BaseException):
                raise runs
            on_fingerprints(FINGERPRINTS)
            for run in runs:
                on_run(run, False)
            facts = report_facts(plan, {}, **FINGERPRINTS)
            write_report(config, facts, runs, Path(config.training.output_dir))
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
        "On this data set lora-fish is not told apart from lora, lora-fish-rand and lora-fish-rev (Every",
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
        (["run", "digits", "lora.fish_rank=0"], "lora.fish_rank=0: must be a whole number from 1 to 65536."),
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


def test_a_shipped_experiment_is_printed_and_copied_but_never_over_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = shipped_experiments()["digits"].read_text()
    assert CliRunner().invoke(app, ["configs", "digits"]).output == shipped
    assert CliRunner().invoke(app, ["configs", "digits", "--copy", "mine.yaml"]).output == "written: mine.yaml\n"
    assert Path("mine.yaml").read_text() == shipped
    Path("mine.yaml").write_text("mine: all\n")
    again = CliRunner().invoke(app, ["configs", "digits", "--copy", "mine.yaml"])
    assert (again.exit_code, Path("mine.yaml").read_text()) == (2, "mine: all\n")
    assert "mine.yaml is there already, and is not overwritten" in again.stderr
    Path("folder").mkdir()
    assert CliRunner().invoke(app, ["configs", "digits", "--copy", "folder"]).exit_code == 0
    assert Path("folder/digits.yaml").read_text() == shipped


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["digts"], "is no shipped experiment; shipped are"),
        (["digts"], "Did you mean 'digits'?"),
        (["--copy", "x.yaml"], "--copy needs the name of a shipped experiment"),
        (["digits", "--copy", "no/such/folder.yaml"], "cannot write no/such/folder.yaml: No such file or directory"),
    ],
)
def test_a_shipped_experiment_that_cannot_be_shown_is_told(arguments: list[str], expected: str) -> None:
    done = CliRunner().invoke(app, ["configs", *arguments])
    assert done.exit_code == 2
    assert expected in done.stderr


def test_a_mistyped_file_gets_its_neighbour(invoke: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/reviews.yaml").write_text("")
    assert "Did you mean 'sub/reviews.yaml'?" in invoke("run", "sub/reviws.yaml").stderr
    assert "Did you mean 'sub/reviews.yaml'?" in invoke("run", "sub/reviews").stderr
    assert "Did you mean 'digits'?" in invoke("run", "digts.yaml").stderr
    (tmp_path / "digits.yaml").write_text("")
    assert "Did you mean 'digits.yaml'?" in invoke("run", "digts.yaml").stderr


@pytest.mark.parametrize("name", [".", "..", "", "/"])
def test_a_folder_in_place_of_a_file_is_told(invoke: Callable[..., Result], name: str) -> None:
    done = invoke("run", name)
    assert (done.exit_code, "is a folder; give a YAML file" in done.stderr) == (2, True)


def test_the_schema_is_printed() -> None:
    done = CliRunner().invoke(app, ["schema"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == experiment_schema()


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"fish-tuning {fish_tuning.__version__}\n"


def test_the_list_of_commands_says_each_in_a_whole_line() -> None:
    lines = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output.splitlines()
    said = {words[0]: line for line in lines if (words := line.split())}
    for command in ("configs", "init", "inspect", "plan", "report", "run", "schema"):
        assert said[command].endswith(".")
        assert not said[command].endswith("...")


@pytest.mark.parametrize("command", [[], ["run"], ["plan"], ["configs"], ["inspect"], ["report"], ["init"], ["schema"]])
def test_h_is_help(command: list[str]) -> None:
    short, long = (CliRunner().invoke(app, [*command, option]) for option in ("-h", "--help"))
    assert short.exit_code == 0
    assert "Usage" in short.output
    assert short.output == long.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("fish-tuning run dig", ["digits"]),
        ("fish-tuning configs paper-gsm", ["paper-gsm8k"]),
        ("fish-tuning plan dig", ["digits"]),
        ("fish-tuning run ./min", ["./mine.yaml"]),
        ("fish-tuning run su", ["sub/"]),
    ],
)
def test_shells_complete_files_and_shipped_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, expected: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "minutes.txt").write_text("")
    (tmp_path / "sub").mkdir()
    asked = {"_FISH_TUNING_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "2"}
    done = CliRunner().invoke(app, [], env=asked, prog_name="fish-tuning")
    assert done.output.split() == expected


def test_quiet_tells_only_what_failed(invoke: Callable[..., Result]) -> None:
    done = invoke("run", "digits", "--quiet", runs=[record("lora", 1, 0.5)])
    assert (done.exit_code, done.output) == (0, "")
    failed = invoke("run", "digits", "-q", runs=[record("lora", 1, 0.5), record("lora-fish", 1, None)])
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr == "lora-fish, seed 1: failed: RuntimeError: it broke\n"
    wrong = invoke("run", "digits", "-q", plan=ConfigurationError("no such column"))
    assert (wrong.exit_code, wrong.output) == (2, "error: no such column\n")
    assert invoke("run", "digits", "-q", "--dry-run").output == ""


def test_verbose_tells_the_library_s_log_and_leaves_it_as_it_was(
    invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = logging.getLogger("fish_tuning")
    before = library.level, library.propagate, list(library.handlers)

    class Talks(list[RunRecord]):
        def __iter__(self) -> Any:
            logging.getLogger("fish_tuning.scores").debug("12 examples one at a time \x1b[31m")
            return super().__iter__()

    quiet, loud = (invoke("run", "digits", *more, runs=Talks([record("lora", 1, 0.5)])) for more in ([], ["-v"]))
    assert "one at a time" not in quiet.output
    assert "fish_tuning.scores: 12 examples one at a time \\x1b[31m" in loud.stderr
    assert "one at a time" not in loud.stdout
    assert (library.level, library.propagate, library.handlers) == before
    both = invoke("run", "digits", "-v", "-q")
    assert (both.exit_code, both.stderr) == (
        2,
        "error: --quiet and --verbose cannot go together; leave one of them out.\n",
    )


def test_json_is_all_that_stands_on_standard_output(invoke: Callable[..., Result], tmp_path: Path) -> None:
    class Prints(list[RunRecord]):
        def __iter__(self) -> Any:
            print("a library's remark")  # noqa: T201
            return super().__iter__()

    runs = Prints([record(arm, seed, 0.5) for arm in ("lora", "lora-fish") for seed in (1, 2)])
    done = invoke("run", "digits", "seeds=[1,2]", "--json", runs=runs)
    assert done.exit_code == 0
    (found,) = json.loads(done.stdout)
    written = json.loads((tmp_path / "results/digits/results.json").read_text())
    assert {key: value for key, value in found.items() if key != "files"} == written
    assert found["facts"].items() >= FINGERPRINTS.items()
    assert found["files"][0] == "results/digits/results.json"
    assert all((tmp_path / file).is_file() for file in found["files"])
    for text in ("a library's remark", "lora-fish, seed 2: accuracy 0.5000", "note: a note of the plan", "written: "):
        assert text in done.stderr
    silent = invoke("run", "digits", "seeds=[1,2]", "--json", "--quiet", runs=[record("lora", 1, None)])
    assert (silent.exit_code, len(json.loads(silent.stdout)[0]["runs"])) == (1, 1)
    assert silent.stderr == "lora, seed 1: failed: RuntimeError: it broke\n"


def test_rates_that_nobody_chose_are_not_told_as_chosen(invoke: Callable[..., Result]) -> None:
    runs = [replace(record(arm, 1, 0.5), learning_rate=0.01) for arm in ("lora", "dora")]
    methods = "peft=[{method: lora}, {method: dora, learning_rates: [0.001, 0.01, 0.1]}]"
    done = invoke("run", "digits", "seeds=[1]", methods, "--json", runs=runs)
    assert json.loads(done.stdout)[0]["facts"]["learning_rates"] == {"dora": 0.01}
    assert "among 0.001, 0.01, 0.1: dora 0.01." in " ".join(done.stderr.split())


def test_json_of_a_dry_run_is_the_plan_and_of_wrong_use_nothing(invoke: Callable[..., Result]) -> None:
    done = invoke("run", "digits", "--json", "--dry-run")
    (found,) = json.loads(done.stdout)
    assert [arm["trainable_parameters"] for arm in found["arms"]] == [3397, 3397]
    assert found["notes"] == ["a note of the plan"]
    wrong = invoke("run", "digitz", "--json")
    assert (wrong.exit_code, wrong.stdout) == (2, "")


def test_what_c_code_prints_is_no_part_of_the_document() -> None:
    code = (
        "import os, subprocess\nfrom fish_tuning.cli.output import stdout_kept\n"
        "with stdout_kept(True) as out:\n"
        "    os.write(1, b'from below, ')\n    subprocess.run(['echo', 'from a child'])\n    out.write('[]')\n"
        "print(' and on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[] and on\n", "from below, from a child\n")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["plan", "--help"], ["init", "--help"], ["configs"], ["schema"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom fish_tuning.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit: pass\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"configs": ["yaml"], "schema": ["yaml"]}.get(arguments[0], [])
    assert done.stdout.endswith(f"heavy: {heavy}\n")


def test_a_wrong_key_is_told_without_importing_torch() -> None:
    code = (
        "import sys\nfrom fish_tuning.cli import run_command\n"
        "code = run_command('digits', ['training.args_override.learning_rat=1'])\n"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"


def test_pulling_imports_no_peft(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom fish_tuning.cli import app\n"
        f"try: app(['pull', 'me/none', {str(tmp_path)!r}])\nexcept SystemExit as end: code = end.code\n"
        "print(code, 'peft' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"


def test_a_mistyped_data_file_is_told_without_importing_torch(tmp_path: Path) -> None:
    (tmp_path / "films.csv").write_text("text,label\n")
    code = (
        "import sys\nfrom fish_tuning.cli import app\n"
        "try: app(['init', 'some-model', 'flims.csv'])\nexcept SystemExit as end: code = end.code\n"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "2 False\n"
    assert f"there is no file 'flims.csv' (from '{tmp_path}'). Did you mean 'films.csv'?" in done.stderr


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


@pytest.mark.parametrize("command", ["run", "init"])
def test_a_full_disk_that_a_library_has_wrapped_is_told(
    command: str, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped = RuntimeError("I/O error: No space left on device (os error 28)")
    draft = ModuleType("fish_tuning.experiments.run.draft")
    draft.draft_experiment = Raises(wrapped)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, draft.__name__, draft)
    done = invoke(command, "digits", *(["data"] if command == "init" else []), runs=wrapped)
    assert done.exit_code == 1
    assert "error: the disk is full (" in done.stderr
    assert "Traceback" not in done.output


class Raises:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, *_: Any) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("error", "launch", "code", "told"),
    [
        (ConfigurationError("no"), None, 2, "error: no\n"),
        (FisherError("no"), None, 2, "error: no\n"),
        (FisherError("no"), ALONE, 1, "error: no\n"),
        (ConfigurationError("no"), Launch(1, 2, 1), 2, ""),
        (FisherError("no"), Launch(1, 2, 1), 1, "process 1 of 2: error: no\n"),
        (KeyboardInterrupt(), None, 130, "stopped\n"),
        (KeyboardInterrupt(), Launch(1, 2, 1), 130, ""),
        (OSError(errno.ENOSPC, "full"), None, 1, "error: the disk is full ([Errno 28] full). Make room.\n"),
        (
            OSError(errno.EFBIG, "File too large"),
            None,
            1,
            "error: a file could not be written or read ([Errno 27] File too large). Make room.\n",
        ),
    ],
)
def test_errors_and_their_exit_codes(
    error: BaseException, launch: Launch | None, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = None if launch is None else (ConfigurationError,)
    with (
        pytest.raises(typer.Exit) as ended,
        errors_told("Make room.", interrupted="stopped", wrong_use=kinds, launch=launch),
    ):
        raise error
    assert ended.value.exit_code == code
    assert capsys.readouterr().err == told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_what_standard_output_cannot_take_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(application, "app", lambda: full.write("a schema"))
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as ended:
            application.main()
    assert ended.value.code == 1
    assert "error: the disk is full" in capsys.readouterr().err


def test_what_is_nobodys_mistake_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), errors_told("Make room."):
        raise ZeroDivisionError


def test_an_interrupted_run_is_an_exit_code_of_scripts_too(invoke: Callable[..., Result]) -> None:
    assert invoke("run", "digits", runs=KeyboardInterrupt()).exit_code == 130  # fakes what is imported below
    assert run_command("digits", []) == 130


def test_one_place_tells_errors() -> None:
    folder = Path(fish_tuning.__file__).parent / "cli"
    assert [file.name for file in folder.glob("*.py") if "except FishTuningError" in file.read_text()] == [
        "application.py"
    ]


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
