"""Arms that are no PEFT adapter, or change while they train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from fish_tuning import ConfigurationError, add_delta, load_delta, load_mask
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.masks.mask_files import read_mask
from fish_tuning.experiments.records.record_files import adapter_digests
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.run import runner
from fish_tuning.experiments.run.plan import plan_experiment

MakeExperiment = Callable[..., ExperimentConfig]
BASE = "peft=[{method: base, args: {target_modules: [query, value]}}]"
ADALORA = "peft=[{method: adalora, args: {target_r: 1, init_r: 3, target_modules: [value]}}, {method: lora}]"


def run_experiment(config: ExperimentConfig) -> list[RunRecord]:
    return runner.run_experiment(config, plan_experiment(config))


def counts(*kept: int) -> list[str]:
    return ["protocol=fixed_count", f"fish_tuning.kept_parameters={list(kept)}"]


def test_base_weights_are_a_pool_like_any_other(experiment: MakeExperiment, tmp_path: Path, bert_folder: Path) -> None:
    settings = ["fish_tuning.methods_to_run=[base, base-fish, base-fish-rand]", "training.head_learning_rate=0.001"]
    runs = run_experiment(experiment(BASE, *counts(50), *settings, "training.args_override.learning_rate=0.01"))
    whole = 2 * 2 * (16 * 16 + 16)
    assert [run.error for run in runs] == [None] * 3
    assert [(run.kept_parameters, run.head_parameters) for run in runs] == [(whole, 34), (50, 34), (50, 34)]
    folder = tmp_path / "results" / "adapters" / "base-fish@n50-seed1"
    assert (runs[1].adapter_digest, runs[1].mask_digest) == adapter_digests(folder)
    assert runs[1].adapter_bytes == (folder / "delta.safetensors").stat().st_size
    mask, delta = load_mask(folder / "fish_mask.safetensors"), load_delta(folder / "delta.safetensors")
    assert delta.num_parameters == 50 + 34
    assert sum(int(selected.sum()) for selected in mask.values()) == 50 + 34
    base = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=2)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    add_delta(base, delta, check_base=False)  # the new head differs
    for name, selected in mask.items():
        changed = before[name] != base.state_dict()[name]
        assert not (changed & ~selected).any()
    assert any((before[name] != base.state_dict()[name]).any() for name in mask if "query" in name or "value" in name)


def test_a_dense_arm_of_base_weights_can_be_looked_at_and_is_found_again(
    experiment: MakeExperiment, tmp_path: Path
) -> None:
    config = experiment(BASE, *counts(50), "fish_tuning.methods_to_run=[base]")
    (first,) = run_experiment(config)
    found = read_mask(str(tmp_path / "results" / "adapters" / "base-seed1"))
    assert found.path.name == "delta.safetensors"
    assert not found.masked
    record = tmp_path / "results" / "runs" / "base-seed1.json"
    written = record.stat().st_mtime_ns
    assert run_experiment(config) == [first]
    assert record.stat().st_mtime_ns == written


def test_base_weights_cannot_be_chosen_again(experiment: MakeExperiment) -> None:
    with pytest.raises(ConfigurationError, match=r"reselect_every cannot go with peft\.method='base'"):
        experiment(BASE, "fish_tuning.reselect_every=2")


def test_arms_that_name_their_score(experiment: MakeExperiment, tmp_path: Path) -> None:
    """Each has the mask that it has alone, whatever was scored before it."""

    def masks(folder: str, *changes: str) -> dict[str, str]:
        output = f"training.output_dir={tmp_path / folder}"
        runs = run_experiment(experiment(*counts(40), output, "fish_tuning.num_samples=8", *changes))
        assert [run.error for run in runs] == [None] * len(runs)
        return {run.arm: run.mask_digest for run in runs}

    both = masks("both", "fish_tuning.methods_to_run=[lora-fish, lora-gain, lora-fish-rand, lora-fish-rev]")
    turned = masks("turned", "fish_tuning.methods_to_run=[lora-fish-rev, lora-gain, lora-fish-rand, lora-fish]")
    by_gain = masks("gain", "fish_tuning.methods_to_run=[lora-fish, lora-fisher]", "fish_tuning.score=gain")
    assert both == turned
    assert both["lora-gain@n40"] == by_gain["lora-fish@n40"]
    assert both["lora-fish@n40"] == by_gain["lora-fisher@n40"]
    assert len(set(both.values())) == 4
    card = (tmp_path / "both" / "adapters" / "lora-gain@n40-seed1" / "README.md").read_text()
    assert "gain, on 8 training examples" in card


def test_adalora_ends_with_the_ranks_it_was_asked_for(
    experiment: MakeExperiment, tmp_path: Path, bert_folder: Path
) -> None:
    config = experiment(
        ADALORA, *counts(64), "fish_tuning.methods_to_run=[adalora, lora-fish]",
        "training.args_override.num_train_epochs=4", "training.args_override.learning_rate=0.01",
    )  # fmt: skip
    plan = plan_experiment(config)
    at_first, at_last = 2 * 3 * (16 + 16 + 1), 2 * (16 + 16 + 1)
    assert (plan.arms[0].pool, plan.arms[0].kept, plan.arms[0].size) == (at_first, at_last, "r 3 to 1")
    assert any(f"adalora trains {at_first} entries at first" in note for note in plan.notes)
    run, _ = run_experiment(config)
    assert (run.error, run.kept_parameters) == (None, at_last)
    assert (run.optimizer_state_bytes or 0) >= 8 * at_first
    base = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=2)
    loaded = PeftModel.from_pretrained(base, tmp_path / "results" / "adapters" / "adalora-seed1")
    sizes = {name: p.numel() for name, p in loaded.named_parameters() if "lora_" in name}
    assert sum(sizes.values()) == at_last


def test_the_ranks_that_adalora_cut_add_nothing(experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    from fish_tuning.experiments.run import arm

    ended: list[torch.Tensor] = []
    left = arm.entries_left

    def watched(model: torch.nn.Module) -> int:
        ended.extend(p.detach().flatten() for name, p in model.named_parameters() if "lora_E" in name)
        return left(model)

    monkeypatch.setattr(arm, "entries_left", watched)
    steps = "training.args_override.max_steps=10"
    run_experiment(experiment(ADALORA, *counts(64), "fish_tuning.methods_to_run=[adalora]", steps))
    assert int(torch.cat(ended).count_nonzero()) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fish_tuning.methods_to_run=[adalora-fish]"], r"adalora-fish@n64 cannot run: AdaLoRA prunes"),
        (["fish_tuning.methods_to_run=[adalora]", "peft=[{method: adalora, args: {target_r: 3, init_r: 3}}]"],
         r"peft\.args\.init_r=3 must be above target_r=3"),
    ],
)  # fmt: skip
def test_what_adalora_cannot_do_is_told_beforehand(
    experiment: MakeExperiment, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        plan_experiment(experiment(ADALORA, *counts(64), *overrides))


def test_a_schedule_that_leaves_adalora_no_steps_is_told(experiment: MakeExperiment) -> None:
    settings = "peft=[{method: adalora, args: {target_r: 1, init_r: 2, tinit: 9, tfinal: 9, target_modules: [value]}}]"
    (run,) = run_experiment(experiment(settings, *counts(64), "fish_tuning.methods_to_run=[adalora]"))
    assert "leave none of the 3 training steps" in (run.error or "")
