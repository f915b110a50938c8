"""A run's adapter stands alone: its card, its labels, its tokenizer; and the record still believes its adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import TrainerCallback

from fish_tuning import count_trainable_parameters, load_adapter
from fish_tuning.experiments.config import secrets
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.records.record_files import adapter_digests, adapter_folder
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.run.arm import run_arm
from fish_tuning.experiments.run.cards import batches_text, tell_all_seeds
from fish_tuning.experiments.run.context import make_context
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.sharing.card import CardFacts, Described, card_text, users_card
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
    config = experiment(
        "seeds=[1,2]", "training.max_seq_length=7", "training.args_override.gradient_accumulation_steps=2"
    )  # fmt: skip
    folder, value, digest = run(config, arm)
    card = ModelCard.load(folder / "README.md")
    for text in (
        f"{arm} on reviews", "`bert` (a folder", "`reviews`", "data fingerprint", f"accuracy {value:.4f}",
        "this seed's alone, one of 2", "results.md",
    ):  # fmt: skip
        assert text in card.text
    assert "batches of 16 x gradient_accumulation_steps 2 = 32 examples a step |" in card.text
    assert ("| score | fisher, on 8 training examples |" in card.text) == (arm == "lora-fish")
    assert card.data.eval_results[0].metric_value == pytest.approx(value, abs=1e-6)
    for path in (bert_folder.parent, Path(config.training.output_dir)):
        assert str(path) not in card.content
        assert str(path) not in (folder / "model_config" / "config.json").read_text()
    assert '"task_type": "SEQ_CLS"' in (folder / "adapter_config.json").read_text()
    assert (folder / "tokenizer.json").is_file()
    # Texts are cut as in training: what comes after the seventh token changes nothing.
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 7
    assert "| texts are cut to | 7 tokens" in card.text
    long, cut = (predict(folder, [{"text": text}])[0] for text in ("good film " * 50, "good film good film good"))
    assert long.pop("text") != cut.pop("text")
    assert long == cut
    whole = predict(folder, [{"text": "good film " * 50}], max_length=60)[0]
    assert whole["probability"] != long["probability"]
    assert (count_trainable_parameters(load_adapter(folder, is_trainable=True)) > 0) is True
    # What lies beside the adapter's own files is no part of what its record was written of.
    (folder / "README.md").write_text("# Mine\n")
    assert adapter_digests(folder).adapter == digest


@pytest.mark.parametrize(
    ("size", "accumulated", "processes", "told"),
    [
        (8, 1, 1, "batches of 8"),
        (8, 4, 1, "batches of 8 x gradient_accumulation_steps 4 = 32 examples a step"),
        (8, 1, 2, "batches of 8 x 2 processes = 16 examples a step"),
        (8, 4, 2, "batches of 8 x gradient_accumulation_steps 4 x 2 processes = 64 examples a step"),
    ],
)
def test_cards_tell_how_many_examples_a_step_sees(size: int, accumulated: int, processes: int, told: str) -> None:
    args: Any = SimpleNamespace(
        train_batch_size=size, gradient_accumulation_steps=accumulated, world_size=processes
    )  # fmt: skip
    assert batches_text(args) == told


def records(values: dict[int, float | None], arm: str = "lora") -> list[RunRecord]:
    return [
        RunRecord(arm, seed, "failed" if value is None else "ok", "accuracy", value=value)
        for seed, value in values.items()
    ]


@pytest.fixture
def cards(tmp_path: Path) -> dict[int, Path]:
    """Of three seeds of one arm."""
    facts = CardFacts(title="lora on x", rows={"a": "b"}, result="accuracy 0.5: this seed's alone.\n\nLater more.")
    files = {seed: adapter_folder(tmp_path, "lora", seed) / "README.md" for seed in (1, 2, 3)}
    for file in files.values():
        file.parent.mkdir(parents=True)
        file.write_text(card_text(Described({}, "load it"), facts))
    return files


def test_cards_tell_of_all_seeds_when_they_are_done(
    cards: dict[int, Path], experiment: MakeExperiment, tmp_path: Path
) -> None:
    config = experiment("seeds=[1,2,3]")
    before = cards[1].read_text()
    tell_all_seeds(config, records({1: 0.5, 2: 0.6}), tmp_path)
    assert cards[1].read_text() == before  # the third is not in yet
    cards[2].write_text("# Mine\n")
    shutil.rmtree(cards[3].parent)  # of a run that another process is putting in its place
    tell_all_seeds(config, records({1: 0.5, 2: 0.6, 3: 0.7}), tmp_path)
    card = cards[1].read_text()
    # Student's t with two degrees of freedom: 0.6 +- 4.302653 * 0.1 / sqrt(3)
    assert "All 3 seeds (1, 2, 3), together: mean accuracy 0.6000, 95 % interval [0.3516, 0.8484] (Student's t" in card
    assert "this seed's alone" in card
    assert "Later more" not in card
    assert cards[2].read_text() == "# Mine\n"
    assert users_card(cards[1]) is None  # still ours, to be written anew
    stamp = cards[1].stat().st_mtime_ns
    tell_all_seeds(config, records({1: 0.5, 2: 0.6, 3: 0.7}), tmp_path)
    assert cards[1].stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({1: 0.5, 2: None, 3: 0.7}, "The 2 seeds that finished (1, 3), together: mean accuracy 0.6000; no interval"),
        ({1: 0.5, 2: None, 3: None}, ""),
        ({1: 0.5, 2: 0.5, 3: 0.5}, "mean accuracy 0.5000; no interval is given, all are equal"),
        ({1: 0.5, 2: 0.5, 3: float("nan")}, "mean accuracy nan; no interval"),
    ],
)
def test_what_failed_is_told(
    values: dict[int, float | None], told: str, cards: dict[int, Path], experiment: MakeExperiment, tmp_path: Path
) -> None:
    tell_all_seeds(experiment("seeds=[1,2,3]"), records(values), tmp_path)
    card = cards[1].read_text()
    assert told in card
    assert ("Later more" in card) == (not told)
    assert (" 1 failed." in card) == (None in values.values() and bool(told))


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
