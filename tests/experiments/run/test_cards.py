"""A run's adapter stands alone: its card, its labels, its tokenizer; and the record still believes its adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import TrainerCallback

from fish_tuning import count_trainable_parameters, load_adapter
from fish_tuning.experiments.config import secrets
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.records.record_files import adapter_digests, adapter_folder
from fish_tuning.experiments.run.arm import run_arm
from fish_tuning.experiments.run.context import make_context
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.sharing.predicting import predict

MakeExperiment = Callable[..., ExperimentConfig]


def run(config: ExperimentConfig, arm: str) -> tuple[Path, float, str]:
    """The adapter's folder, the run's metric, and the digest in its record."""
    context = make_context(config, plan_experiment(config), TrainerCallback())
    record, _ = run_arm(context, context.plan.arm(arm), 1)
    assert record.value is not None
    return adapter_folder(context.folder, arm, 1), record.value, record.adapter_digest


@pytest.mark.parametrize("arm", ["lora", "lora-fish"])
def test_the_adapter_of_a_run_stands_alone(arm: str, experiment: MakeExperiment, bert_folder: Path) -> None:
    config = experiment("seeds=[1,2]")
    folder, value, digest = run(config, arm)
    card = ModelCard.load(folder / "README.md")
    for text in (
        f"{arm} on reviews", "`bert` (a folder", "`reviews`", "data fingerprint", f"accuracy {value:.4f}",
        "this seed's alone, one of 2", "results.md",
    ):  # fmt: skip
        assert text in card.text
    assert ("| score | fisher, on 8 training examples |" in card.text) == (arm == "lora-fish")
    assert card.data.eval_results[0].metric_value == pytest.approx(value, abs=1e-6)
    for path in (bert_folder.parent, Path(config.training.output_dir)):
        assert str(path) not in card.content
        assert str(path) not in (folder / "model_config" / "config.json").read_text()
    assert '"task_type": "SEQ_CLS"' in (folder / "adapter_config.json").read_text()
    assert (folder / "tokenizer.json").is_file()
    assert predict(folder, [{"text": "a good film"}])[0]["prediction"] in ("0", "1")
    assert (count_trainable_parameters(load_adapter(folder, is_trainable=True)) > 0) is True
    # What lies beside the adapter's own files is no part of what its record was written of.
    (folder / "README.md").write_text("# Mine\n")
    assert adapter_digests(folder).adapter == digest


def test_base_weights_have_a_card_too(experiment: MakeExperiment) -> None:
    config = experiment(
        "peft={method: base, args: {target_modules: [query]}}", "fish_tuning.methods_to_run=[base-fish]",
        "fish_tuning.prune_to_ratio_of_baseline=0.1",
    )  # fmt: skip
    folder, *_ = run(config, "base-fish")
    card = (folder / "README.md").read_text()
    assert "saved as their difference" in card
    assert "add_delta(model" in card
    assert (folder / "model_config" / "config.json").is_file()


def test_no_secret_gets_into_a_card(experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_values", {"reviews": "${CORPUS}"})
    folder, *_ = run(experiment(), "lora-fish")
    card = (folder / "README.md").read_text()
    assert "reviews" not in card
    assert "${CORPUS}" in card
