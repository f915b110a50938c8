from __future__ import annotations

from pathlib import Path

from transformers import TrainerControl, TrainerState, TrainingArguments

from fish_tuning.experiments.run.progress import RunProgress


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
