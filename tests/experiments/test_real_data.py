"""The shipped MiniLM experiments on the real text, cut to seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from fish_tuning.experiments.config.loading import load_experiment
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.runner import run_experiment


@pytest.mark.real_data
@pytest.mark.parametrize(("task", "columns"), [("sst2", ("sentence",)), ("mrpc", ("sentence1", "sentence2"))])
def test_minilm_runs_from_local_folders(
    task: str, columns: tuple[str, ...], real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FISH_TUNING_DATA", str(real_data))
    overrides = ["dataset.max_train_samples=48", "fish_tuning.num_samples=16", "fish_tuning.methods_to_run=[lora-fish]",
                 "training.args_override.num_train_epochs=1", "training.max_seq_length=24", "seeds=[0]",
                 f"training.output_dir={tmp_path}"]  # fmt: skip
    config = load_experiment(f"minilm-{task}", overrides)
    plan = plan_experiment(config)
    assert plan.task.columns == columns
    (record,) = run_experiment(config, plan)
    assert record.status == "ok", record.error
    # Rank 4 on query, key and value of six layers, 384 wide, and the head.
    assert record.trainable_parameters == 6 * 3 * 4 * (384 + 384) + 384 * 2 + 2
    assert record.value is not None
    assert 0.3 < record.value < 1
    assert not (tmp_path / "checkpoints").exists()
