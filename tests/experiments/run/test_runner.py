from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from folders import write_sentences
from safetensors import SafetensorError

from fish_tuning.experiments.compare.conclusions import differences
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.records.record_files import adapter_digests, write_record
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.run import arm as arms
from fish_tuning.experiments.run import runner, trainings
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.runner import run_experiment

MakeExperiment = Callable[..., ExperimentConfig]
Seen = list[tuple[str, int, str, bool]]

RUN_KEYS = {"arm", "seed", "metric", "value", "trainable_parameters", "train_seconds", "fisher_seconds",
            "peak_memory_bytes", "optimizer_state_bytes", "adapter_bytes", "status"}  # fmt: skip


def run(config: ExperimentConfig) -> tuple[list[RunRecord], Seen]:
    seen: Seen = []
    records = run_experiment(
        config,
        plan_experiment(config),
        lambda record, known: seen.append((record.arm, record.seed, record.status, known)),
    )
    return records, seen


def test_a_run_writes_everything_and_is_repeatable(experiment: MakeExperiment, tmp_path: Path) -> None:
    records, _ = run(experiment())
    folder = tmp_path / "results"
    result = json.loads((folder / "results.json").read_text())
    assert [entry["arm"] for entry in result["runs"]] == [arm.arm for arm in plan_experiment(experiment()).arms]
    assert all(entry.keys() >= RUN_KEYS and entry["status"] == "ok" for entry in result["runs"])
    assert len(result["summary"]) == 5
    for name in ("results.csv", "results.md", "metric.png", "kept.png"):
        assert (folder / name).stat().st_size
    other, told = experiment(f"training.output_dir={tmp_path / 'again'}"), dict[str, str]()
    again = run_experiment(other, plan_experiment(other), on_fingerprints=told.update)
    assert sorted(told) == ["data_fingerprint", "weights_fingerprint"]
    assert told.items() <= result["facts"].items()
    assert [record.metrics for record in again] == [record.metrics for record in records]


def test_what_a_dense_arm_has_as_its_head_is_what_is_asked_for_now(experiment: MakeExperiment) -> None:
    given = ("fish_tuning.methods_to_run=[lora]", "seeds=[1]")
    first, _ = run(experiment(*given))
    again, seen = run(experiment(*given, "lora.names_to_exclude=[]"))
    assert all(known for *_, known in seen)
    assert first[0].head_parameters
    assert (again[0].head_parameters, again[0].kept_parameters) == (0, first[0].trainable_parameters)


def test_a_longer_list_of_learning_rates_leaves_finished_runs_seeds_of_new_ones(experiment: MakeExperiment) -> None:
    given = ("fish_tuning.methods_to_run=[lora, lora-fish-rand]", "training.args_override.num_train_epochs=1")
    run(experiment(*given, "training.learning_rates=[0.02, 0.001]", "seeds=[1, 2]"))
    records, seen = run(experiment(*given, "training.learning_rates=[0.02, 0.001, 100.0]", "seeds=[1, 2, 3]"))
    assert {known for *_, known in seen} == {False, True}
    for arm in ("lora", "lora-fish-rand"):
        assert len({record.setting for record in records if record.arm == arm}) == 1
    assert not any((each.reason or "").startswith("Runs") for each in differences(records))


def test_what_is_finished_is_not_repeated(experiment: MakeExperiment) -> None:
    first, seen = run(experiment("fish_tuning.methods_to_run=[lora, lora-fish]"))
    assert not any(known for *_, known in seen)
    second, seen = run(experiment("seeds=[1, 2]", "fish_tuning.methods_to_run=[lora, lora-fish]"))
    assert {(arm, seed): known for arm, seed, _, known in seen} == {
        ("lora", 1): True, ("lora-fish", 1): True, ("lora", 2): False, ("lora-fish", 2): False,
    }  # fmt: skip
    assert [record for record in second if record.seed == 1] == first
    folder, values = Path(experiment().training.output_dir), [r.value or 0 for r in second if r.arm == "lora"]
    for seed, own in zip((1, 2), values, strict=True):  # cards now tell of both, and the records believe their adapters
        card = (folder / "adapters" / f"lora-seed{seed}" / "README.md").read_text()
        assert f"All 2 seeds (1, 2), together: mean accuracy {sum(values) / 2:.4f}; no interval" in card
        assert f"accuracy {own:.4f} on the 24 examples" in card
    _, seen = run(experiment("seeds=[1, 2]", "fish_tuning.methods_to_run=[lora, lora-fish]"))
    assert all(known for *_, known in seen)


def test_a_record_of_before_tells_what_it_shares_once_it_is_found_again(
    experiment: MakeExperiment, tmp_path: Path
) -> None:
    config = experiment("fish_tuning.methods_to_run=[lora]")
    (first,) = run_experiment(config, plan_experiment(config))
    assert first.common
    write_record(tmp_path / "results", replace(first, common="", method_own=""))
    (again,) = run_experiment(config, plan_experiment(config))
    assert (again.train_seconds, again.common, again.method_own) == (
        first.train_seconds, first.common, first.method_own,
    )  # fmt: skip
    listed = json.loads((tmp_path / "results" / "results.json").read_text())["runs"]
    assert listed[0]["common"] == first.common


def test_another_configuration_runs_again_but_only_where_it_counts(experiment: MakeExperiment) -> None:
    arms_run = "fish_tuning.methods_to_run=[lora, lora-fish]"
    run(experiment(arms_run))
    _, seen = run(experiment(arms_run, "fish_tuning.prune_to_ratio_of_baseline=0.6"))
    assert {arm: known for arm, _, _, known in seen} == {"lora": True, "lora-fish": False}
    _, seen = run(experiment(arms_run, "training.args_override.learning_rate=0.01"))
    assert not any(known for *_, known in seen)


def test_a_failed_arm_stops_no_other_and_is_tried_again(
    experiment: MakeExperiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(arms, "calibrate", broken)
        records, _ = run(experiment())
    assert [record.status for record in records] == ["ok", "failed", "ok", "failed", "ok"]
    assert "RuntimeError: out of memory" in (records[1].error or "")
    log = tmp_path / "results" / "runs" / "lora-fish-seed1.log"
    assert "Traceback" in log.read_text()
    assert "out of memory" in (tmp_path / "results" / "results.md").read_text()
    records, seen = run(experiment())
    assert [record.status for record in records] == ["ok"] * 5
    assert [known for *_, known in seen] == [True, False, True, False, True]
    assert not log.exists()


def test_a_full_disk_stops_the_experiment_and_keeps_what_is_finished(
    experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = arms.save

    def full(model: object, mask: object, folder: Path, *more: object) -> arms.Saved:
        if "fish" in folder.name:  # as safetensors tells of it
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        return save(model, mask, folder)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(arms, "save", full)
        with pytest.raises(OSError, match="No space left") as raised:
            run(experiment())
    assert raised.value.errno == errno.ENOSPC
    _, seen = run(experiment())
    assert [known for *_, known in seen][:2] == [True, False]


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_an_interruption_keeps_what_is_finished(experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(arms, "calibrate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(experiment())
    _, seen = run(experiment())
    assert seen[0] == ("lora", 1, "ok", True)


@pytest.mark.parametrize("torn", ['{"arm": "lo', "{}", "[]", "null", '{"arm": "lora", "kept": 3}'])
def test_a_torn_record_is_run_again(experiment: MakeExperiment, tmp_path: Path, torn: str) -> None:
    only = "fish_tuning.methods_to_run=[lora]"
    run(experiment(only))
    (tmp_path / "results" / "runs" / "lora-seed1.json").write_text(torn)
    _, seen = run(experiment(only))
    assert seen == [("lora", 1, "ok", False)]


def test_changed_data_is_run_again(experiment: MakeExperiment, tmp_path: Path) -> None:
    data = write_sentences(tmp_path / "own")
    settings = [f"dataset.load_args=[{data}]", "fish_tuning.methods_to_run=[lora]"]
    run(experiment(*settings))
    write_sentences(data, train=64)
    _, seen = run(experiment(*settings))
    assert seen == [("lora", 1, "ok", False)]


def test_random_masks_do_not_depend_on_the_scoring(experiment: MakeExperiment) -> None:
    masked = "fish_tuning.methods_to_run=[lora-fish, lora-fish-rand]"
    run(experiment(masked))
    _, seen = run(experiment(masked, "fish_tuning.num_samples=4"))
    assert {arm: known for arm, _, _, known in seen} == {"lora-fish": False, "lora-fish-rand": True}


def test_a_diverged_run_has_failed(experiment: MakeExperiment) -> None:
    wild = "training.args_override.learning_rate=1.0e+30"
    (record,), _ = run(experiment(wild, "fish_tuning.methods_to_run=[lora]"))
    assert record.status == "failed"
    assert "diverged" in (record.error or "")


def test_further_validation_sets_are_measured_too(experiment: MakeExperiment) -> None:
    config = experiment("fish_tuning.methods_to_run=[lora]")
    plan = plan_experiment(config)
    plan.task.more_validation["mismatched"] = plan.task.validation.select(range(10))
    (record,) = run_experiment(config, plan)
    assert record.metrics.keys() >= {"accuracy", "loss", "accuracy_mismatched", "loss_mismatched"}


def test_a_record_is_not_believed_beside_another_runs_adapter(
    experiment: MakeExperiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Run A; run B with another learning rate, stopped just before its record; run A again."""
    only = "fish_tuning.methods_to_run=[lora]"
    (first,), _ = run(experiment(only))
    with monkeypatch.context() as patch:
        patch.setattr(runner, "write_record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(experiment(only, "training.args_override.learning_rate=0.1"))
    (again,), seen = run(experiment(only))
    assert seen == [("lora", 1, "ok", False)]
    assert "lora, seed 1 is run again: the adapter in " in caplog.text
    assert (again.adapter_digest, again.metrics) == (first.adapter_digest, first.metrics)
    assert adapter_digests(tmp_path / "results" / "adapters" / "lora-seed1").adapter == again.adapter_digest


def test_a_lost_adapter_is_made_again(
    experiment: MakeExperiment, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    only = "fish_tuning.methods_to_run=[lora]"
    run(experiment(only))
    shutil.rmtree(tmp_path / "results" / "adapters")
    _, seen = run(experiment(only))
    assert seen == [("lora", 1, "ok", False)]
    assert "lora, seed 1 is run again: its adapter " in caplog.text
    assert run(experiment(only))[1] == [("lora", 1, "ok", True)]


def test_a_run_that_killed_two_processes_is_a_failure(experiment: MakeExperiment, tmp_path: Path) -> None:
    config = experiment("fish_tuning.methods_to_run=[lora, lora-fish]")
    plan, began = plan_experiment(config), time.time()
    note = tmp_path / "results" / "locks" / "lora-seed1.holder"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps({"process": "1 on a host", "began": [began + 1, began + 2]}))
    for _ in range(2):  # the second time it is known to have failed
        lora, fish = run_experiment(config, plan, since=began)
        assert (lora.status, fish.status) == ("failed", "ok")
        assert "2 processes that were at it have been killed" in (lora.error or "")
    lora, _ = run_experiment(config, plan)
    assert lora.status == "ok"


def test_a_report_gets_notes_and_arms_and_the_plan_stays_as_it_is(experiment: MakeExperiment, tmp_path: Path) -> None:
    config = experiment("fish_tuning.methods_to_run=[lora, lora-fish]", "fish_tuning.warmup_steps=0")
    plan = plan_experiment(config)
    before = dict(plan.facts)
    run_experiment(config, plan)
    assert dict(plan.facts) == before
    facts = json.loads((tmp_path / "results" / "results.json").read_text())["facts"]
    assert facts["arms"] == ["lora", "lora-fish"]
    assert "B starts at 0" in facts["notes"][0]
    assert before.items() <= facts.items()


def test_a_setting_is_shared_by_seeds(experiment: MakeExperiment) -> None:
    one, two = run(experiment("fish_tuning.methods_to_run=[lora]", "seeds=[1, 2]"))[0]
    assert one.setting == two.setting != ""
    assert one.config_hash != two.config_hash


def test_the_processs_first_steps_are_no_arms(experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(trainings, "use_once", lambda context, arm, seed: order.append("once"))
    work = trainings.run_arm

    def watched(*arguments: Any) -> Any:
        order.append("arm")
        return work(*arguments)

    monkeypatch.setattr(trainings, "run_arm", watched)
    config = experiment("fish_tuning.methods_to_run=[lora, lora-fish]")
    run(config)
    assert order == ["once", "arm", "arm"]
    order.clear()
    run(config)
    assert order == [], "nothing is trained where all is finished"
