from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from fish_tuning.experiments.run.progress import RunProgress, _duration


def test_the_bar_tells_the_run_its_steps_and_its_evaluation(tmp_path: Path) -> None:
    args, state, control = TrainingArguments(str(tmp_path), report_to="none"), TrainerState(), TrainerControl()
    state.max_steps = 4
    with RunProgress(2) as progress:
        progress.start("lora", 1)
        state.global_step = 2
        progress.on_step_end(args, state, control)
        assert (progress.bar.n, progress.bar.desc) == (0.5, "lora, seed 1")
        progress.on_prediction_step(args, state, control)
        progress.on_prediction_step(args, state, control)
        assert progress.bar.desc == "lora, seed 1, evaluating: batch 2"
        progress.on_step_end(args, state, control)
        assert progress.bar.desc == "lora, seed 1"
        progress.finish()
        assert progress.bar.n == 1


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_there_is_a_line_now_and_then(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args, state, control = TrainingArguments(str(tmp_path), report_to="none"), TrainerState(), TrainerControl()
    state.max_steps, clock = 10, Clock()
    with RunProgress(4, clock=clock) as progress:
        progress.start("lora", 1)  # was finished before: it tells nothing of the time that is left
        progress.finish()
        progress.start("lora", 2)
        for step in range(1, 11):
            clock.now, state.global_step = 10.0 * step, step
            progress.on_step_end(args, state, control)
        progress.finish()
        progress.start("lora-fish", 1)
        clock.now = 131.0
        progress.on_prediction_step(args, state, control)
    assert capsys.readouterr().err.splitlines() == [
        "lora, seed 2: step 3 of 10; 1 of 4 runs done, about 4 min left",
        "lora, seed 2: step 6 of 10; 1 of 4 runs done, about 4 min left",
        "lora, seed 2: step 9 of 10; 1 of 4 runs done, about 4 min left",
        "lora-fish, seed 1: evaluating, batch 1; 2 of 4 runs done, about 4 min left",
    ]


def test_what_is_made_once_for_all_runs_is_no_measure_of_the_time_that_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, state, control = TrainingArguments(str(tmp_path), report_to="none"), TrainerState(), TrainerControl()
    state.max_steps, clock = 10, Clock()
    with RunProgress(15, clock=clock) as progress:
        clock.now = 120.0  # a built-in model is made, data are read
        progress.start("lora", 1)
        clock.now, state.global_step = 121.0, 1
        progress.on_step_end(args, state, control)
    assert capsys.readouterr().err == "lora, seed 1: step 1 of 10; 0 of 15 runs done, about 2 min left\n"


def test_nothing_is_shown_where_nothing_is_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args, state, control = TrainingArguments(str(tmp_path), report_to="none"), TrainerState(), TrainerControl()
    state.max_steps, clock = 10, Clock()
    with RunProgress(2, shown=False, clock=clock) as progress:
        progress.start("lora", 1)
        clock.now, state.global_step = 100.0, 3
        progress.on_step_end(args, state, control)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89, "89 s"), (91, "2 min"), (5399, "90 min"), (7200, "2.0 h"), (2e5, "2.3 days")]
)
def test_durations(seconds: float, text: str) -> None:
    assert _duration(seconds) == text
