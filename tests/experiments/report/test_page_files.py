"""What the report reads, how it joins experiments, and its Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import failed, kept, ok, scores
from page_records import config, parse, write_experiment
from typer.testing import CliRunner

from fish_tuning import save_mask
from fish_tuning.cli import app
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.report.page import write_page
from fish_tuning.experiments.report.page.differences import signed
from fish_tuning.experiments.report.page.load import read_experiments
from fish_tuning.experiments.report.page.masks import agreements, joined
from fish_tuning.experiments.report.page.results import join_results
from fish_tuning.experiments.report.page.texts import latex_escape

EVIL = r"50% of a_b & c#d $x$ {y} \z ~^ <t>"


def test_torn_files_are_left_out_with_a_note(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path / "a", scores("lora", [0.5, 0.6, 0.7]))
    for name, text in (("torn", '{"arm": "lo'), ("list", "[1]"), ("other", '{"arm": 3, "seed": "x"}')):
        (folder / "runs" / f"{name}.json").write_text(text)
    experiments, notes = read_experiments([tmp_path])
    assert [run.seed for run in experiments[0].runs] == [1, 2, 3]
    told = [note for note in notes if "left out" in note]
    assert len(told) == 3
    assert "cut off, or not JSON" in next(note for note in told if "torn.json" in note)
    assert "not the record of a run" in next(note for note in told if "other.json" in note)


def test_runs_come_from_results_json_where_their_files_are_gone(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path / "a", scores("lora", [0.5, 0.6]), settings=config("trial", ["lora"], [1, 2]))
    for path in (folder / "runs").iterdir():
        path.unlink()
    experiments, notes = read_experiments([folder])
    assert len(experiments[0].runs) == 2
    assert notes == []


def test_a_run_of_an_earlier_configuration_is_told(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path / "a", scores("lora", [0.5, 0.6]), settings=config("trial", ["lora"], [1, 2]))
    path = folder / "runs" / "lora-seed2.json"
    path.write_text(path.read_text().replace('"config_hash": ""', '"config_hash": "old"'))
    _, notes = read_experiments([folder])
    assert len(notes) == 1
    assert "1 of 2 runs" in notes[0]
    assert "lora seed 2" in notes[0]


def test_older_records_take_task_and_model_from_the_folder(tmp_path: Path) -> None:
    folder = write_experiment(
        tmp_path / "a", scores("lora", [0.5]), settings=config("trial", ["lora"], [1, 2]), task="sst2"
    )
    (experiment,), _ = read_experiments([folder, tmp_path])  # found twice, read once
    assert (experiment.runs[0].task, experiment.runs[0].model, experiment.name) == ("sst2", "org/tiny", "trial")
    assert experiment.missing == [("lora", 2)]


def test_experiments_on_one_task_share_a_column_unless_they_contradict(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"task": "rte", "setting": "s", "experiment": "x"}
    runs = [*scores("lora", [0.5, 0.6], **settings), *scores("lora-fish", [0.5], **settings)]
    write_experiment(tmp_path / "one", runs)
    later = [replace(ok(arm, 3, 0.7, **settings), experiment="x") for arm in ("lora", "lora-fish")]
    write_experiment(tmp_path / "two", later)
    shared = join_results(read_experiments([tmp_path])[0])
    assert shared.tasks == ("rte",)
    assert shared.to_dense.overall[0].n == 2
    write_experiment(tmp_path / "three", scores("lora", [0.5, 0.9], task="rte"))
    apart = join_results(read_experiments([tmp_path])[0])
    assert apart.tasks == ("rte (one)", "rte (three)", "rte (two)")
    assert apart.averages == {}
    assert any("column of its own" in note for note in apart.notes)


def two_arms(common: str = "", other: str = "", **changes: Any) -> list[RunRecord]:
    """Three seeds of a dense arm and of a much better masked one."""
    named: dict[str, Any] = {"task": "rte", "experiment": "x", "method_own": common and "m", **changes}
    dense = [ok("lora", s, 0.5 + s / 100, common=common, config_hash=f"d{s}", setting="d", **named) for s in (1, 2, 3)]
    fish = [
        ok("lora-fish", s, 0.7 + s / 99, common=other, config_hash=f"f{s}", setting="f", **named) for s in (1, 2, 3)
    ]
    return [*dense, *fish]


@pytest.mark.parametrize("other", ["a", "b"])
def test_arms_of_two_folders_are_compared_where_they_were_trained_alike(tmp_path: Path, other: str) -> None:
    runs = two_arms("a", other)
    for name, mine in (("one", runs[:3]), ("two", runs[3:])):
        write_experiment(tmp_path / name, mine, settings=config("x", ["lora", "lora-fish"], [1, 2, 3]), task="rte")
    results = join_results(read_experiments([tmp_path])[0])
    (comparison,) = results.to_dense.overall
    if other == "a":
        assert (results.tasks, comparison.verdict) == (("rte",), "better")
        return
    assert len(results.tasks) == 2
    assert any("column of its own" in note for note in results.notes)
    assert (comparison.verdict, comparison.n) == ("settings differ", 0)


def test_what_an_earlier_configuration_left_in_a_folder_is_not_compared(tmp_path: Path) -> None:
    runs = two_arms("a", "old")
    folder = write_experiment(tmp_path / "one", runs[:3], settings=config("x", ["lora"], [1, 2, 3]), task="rte")
    for run in runs[3:]:
        (folder / "runs" / f"{run.arm}-seed{run.seed}.json").write_text(json.dumps(run.to_dict()))
    (comparison,) = join_results(read_experiments([folder])[0]).to_dense.overall
    assert comparison.verdict == "settings differ"


@pytest.mark.parametrize("listed", [6, 4, 3], ids=["all", "one of the seeds", "none of the arm"])
def test_older_records_are_compared_as_far_as_results_json_holds_them_together(tmp_path: Path, listed: int) -> None:
    runs = two_arms()
    settings = config("x", ["lora", "lora-fish"], [1, 2, 3])
    folder = write_experiment(tmp_path / "one", runs[:listed], settings=settings, task="rte")
    for run in runs[listed:]:
        (folder / "runs" / f"{run.arm}-seed{run.seed}.json").write_text(json.dumps(run.to_dict()))
    (comparison,) = join_results(read_experiments([folder])[0]).to_dense.overall
    # Seeds of one arm under one setting share all else.
    assert comparison.verdict == ("settings differ" if listed == 3 else "better")


def test_older_records_of_two_folders_go_by_their_configurations(tmp_path: Path) -> None:
    runs = two_arms()
    for name, mine, steps in (("one", runs[:3], 5), ("two", runs[3:], 5), ("three", runs[3:], 6)):
        settings = config("x", ["lora", "lora-fish"], [1, 2, 3])
        settings["training"] = {"output_dir": name, "args_override": {"max_steps": steps}}
        write_experiment(tmp_path / name, mine, settings=settings, task="rte")
    verdicts = [
        join_results(read_experiments([tmp_path / "one", tmp_path / other])[0]).to_dense.overall[0].verdict
        for other in ("two", "three")
    ]
    assert verdicts == ["better", "settings differ"]


def test_a_record_goes_by_the_results_json_that_lists_it(tmp_path: Path) -> None:
    """A configuration that is run again finds runs of versions, or under lists of rates, whose files say otherwise."""
    runs = two_arms("a", "a")
    folder = write_experiment(tmp_path / "one", runs, settings=config("x", ["lora"], [1, 2, 3]), task="rte")
    for run in runs[:3]:
        old = replace(run, common="", method_own="")
        (folder / "runs" / f"{run.arm}-seed{run.seed}.json").write_text(json.dumps(old.to_dict()))
    (comparison,) = join_results(read_experiments([folder])[0]).to_dense.overall
    assert comparison.verdict == "better"


def test_a_run_that_failed_in_one_folder_and_finished_in_another_counts_as_finished(tmp_path: Path) -> None:
    named = {"task": "rte", "experiment": "x"}
    first = [ok("lora", 1, 0.5, **named), *(replace(failed("lora", seed), **named) for seed in (2, 3))]
    write_experiment(tmp_path / "a", first)
    write_experiment(tmp_path / "b", [ok("lora", 2, 0.6, **named)])
    for folders in (["a", "b"], ["b", "a"]):
        results = join_results(read_experiments([tmp_path / name for name in folders])[0])
        assert results.tasks == ("rte",)
        score = results.scores["lora", "rte"]
        assert (sorted(score.values), score.n_failed) == ([0.5, 0.6], 1)


def test_a_failed_run_with_another_metric_is_no_contradiction(tmp_path: Path) -> None:
    runs = [replace(ok("lora", 1, 0.5, task="cola"), metric="matthews"), replace(failed("lora", 2), task="cola")]
    (experiment,), _ = read_experiments([write_experiment(tmp_path / "a", runs)])
    results = join_results([experiment])
    assert (results.tasks, results.notes) == (("cola",), ())


def test_one_task_with_two_models_has_two_columns(tmp_path: Path) -> None:
    for model in ("org/tiny", "org/base"):
        write_experiment(tmp_path / model, scores("lora", [0.5, 0.6], task="rte", model=model))
    assert join_results(read_experiments([tmp_path])[0]).tasks == ("rte (base)", "rte (tiny)")


def test_arms_stand_by_method_choice_and_budget(tmp_path: Path) -> None:
    arms = ["lora-fish@0.5", "dora", "lora-fish-rand", "lora-fish@0.05", "lora", "lora-fish", "dora-fish"]
    write_experiment(tmp_path / "a", [ok(arm, 1, 0.5) for arm in arms])
    assert join_results(read_experiments([tmp_path])[0]).arms == (
        *("dora", "dora-fish"),
        *("lora", "lora-fish@0.05", "lora-fish@0.5", "lora-fish", "lora-fish-rand"),
    )


def test_on_each_task_p_is_corrected_over_all_tasks(tmp_path: Path) -> None:
    for task in ("a", "b", "c", "d"):
        better = [0.5 + seed / 90 + wobble for seed, wobble in enumerate([0.06, -0.02, 0.05, -0.01, 0.06, 0.01, 0.04])]
        runs = [
            *scores("lora", [0.5 + seed / 90 for seed in range(7)], task=task),
            *scores("lora-fish", better, task=task),
        ]
        write_experiment(tmp_path / task, runs)
    results = join_results(read_experiments([tmp_path])[0])
    alone = results.to_dense.by_task["lora-fish", "lora", "a"]
    assert alone.p == pytest.approx(0.0586, abs=0.02)
    assert alone.p_corrected == pytest.approx(4 * alone.p)
    assert alone.verdict == "no difference shown"
    assert results.to_dense.overall[0].verdict == "better"


def test_overlap_of_masks_beside_chance(tmp_path: Path) -> None:
    arms = ("lora-fish", "lora-fish-rand")
    folder = write_experiment(tmp_path / "a", [ok(arm, seed, 0.5, kept=kept(1, 2)) for arm in arms for seed in (1, 2)])
    chosen = {"lora-fish-seed1": [0, 1], "lora-fish-seed2": [1, 2], "lora-fish-rand-seed1": [6, 7]}
    for name, entries in chosen.items():
        mask = torch.zeros(8, dtype=torch.bool)
        mask[entries] = True
        (folder / "adapters" / name).mkdir(parents=True)
        save_mask({"base_model.x.lora_A.weight": mask}, folder / "adapters" / name / "fish_mask.safetensors")
    found, notes = agreements(read_experiments([folder])[0])
    assert notes == []
    seeds, random = found
    assert (seeds.arm, seeds.other, seeds.pairs) == ("lora-fish", "other seeds", 1)
    assert seeds.jaccard == pytest.approx(1 / 3)
    assert seeds.by_chance == pytest.approx(0.5 / 3.5)  # two of eight twice: half an entry in common
    assert (random.other, random.pairs, random.jaccard) == ("lora-fish-rand", 1, 0.0)


def test_overlaps_of_several_experiments_are_joined(tmp_path: Path) -> None:
    for name, second in (("a", [0, 1]), ("b", [2, 3])):
        folder = write_experiment(
            tmp_path / name, [ok("lora-fish", seed, 0.5, task=name, kept=kept(1, 2)) for seed in (1, 2)]
        )
        for seed, entries in ((1, [0, 1]), (2, second)):
            mask = torch.zeros(8, dtype=torch.bool)
            mask[entries] = True
            (folder / "adapters" / f"lora-fish-seed{seed}").mkdir(parents=True)
            path = folder / "adapters" / f"lora-fish-seed{seed}" / "fish_mask.safetensors"
            save_mask({"base_model.x.lora_A.weight": mask}, path)
    found, _ = agreements(read_experiments([tmp_path])[0])
    assert [(each.experiment, each.jaccard) for each in found] == [("a", 1.0), ("b", 0.0)]
    (both,) = joined(found)
    assert (both.arm, both.other, both.pairs, both.jaccard) == ("lora-fish", "other seeds", 2, 0.5)
    write_page([tmp_path])
    masks = parse((tmp_path / "report.html").read_text()).one("section", id="masks")
    whole, apart = (table for table in masks.all("table") if "Jaccard" in table.one("caption").text)
    assert len(whole.one("tbody").all("tr")) == 1
    assert len(apart.one("tbody").all("tr")) == 2


def test_a_broken_mask_file_is_a_note(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path / "a", [ok("lora-fish", seed, 0.5, kept=kept(1, 2)) for seed in (1, 2)])
    path = folder / "adapters" / "lora-fish-seed1"
    path.mkdir(parents=True)
    (path / "fish_mask.safetensors").write_bytes(b"not a mask")
    write_page([folder])
    assert "left out of the overlaps" in parse((folder / "report.html").read_text()).one("section", id="failures").text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0124, "+0.012"), (-0.0124, "\N{MINUS SIGN}0.012"), (-0.0004, "0.000"), (0.0, "0.000")]
)
def test_what_rounds_to_nothing_has_no_minus(value: float, text: str) -> None:
    assert signed(value) == text


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    better = [0.7 + seed / 100 for seed in range(7)]
    runs = [
        *scores("lora", [0.5 + seed / 90 for seed in range(7)], task=EVIL),
        *scores("lora-fish", better, task=EVIL),
        *scores("lora-fish-rand", [0.5, 0.6], task=EVIL),
        failed("lora-fish-rand", 3, f"RuntimeError: {EVIL}\n| more"),
    ]
    runs[-1] = type(runs[-1])(**{**runs[-1].to_dict(), "task": EVIL})
    written, _ = write_page([write_experiment(tmp_path / "a", runs)])
    return {path.suffix: path.read_text() for path in written}


def test_latex_is_balanced_and_escaped(texts: dict[str, str]) -> None:
    text = texts[".tex"]
    body = re.sub(r"(?m)^%.*$", "", text)
    body = body.replace(r"\ifdim\wd0>\linewidth", "")
    bare = re.sub(r"\\[\\{}$&%#_]", "", body)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert not re.search(r"[#%~<>]", bare)
    assert re.findall(r"\\begin\{(\w+)\}", text) == ["table", "tabular"] * 3
    assert re.findall(r"\\end\{(\w+)\}", text) == ["tabular", "table"] * 3
    tables = re.findall(r"(?s)\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text)
    for (columns, content), length in zip(tables, (4, 3, 2), strict=True):  # scores, to dense, of choice
        lines = [line for line in content.splitlines() if line.endswith(r"\\")]
        assert len(lines) == length
        for line in lines:
            assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1
    assert r"lora-fish & lora & $+0.197^{*}$ &" in text
    assert r"{\footnotesize 2 seeds; at least 3 are needed." in text
    assert r"$0.730 \pm 0.020^{*}$" in text
    assert r"$0.550$ (1 failed)" in text


def test_latex_escape() -> None:
    assert latex_escape(r"a_b\c{d}") == r"a\_b\textbackslash{}c\{d\}"


def test_markdown_keeps_its_tables_whole(texts: dict[str, str]) -> None:
    text = texts[".md"]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}
    assert widths == {5, 7, 10}  # scores, costs, differences and choices
    assert "| lora-fish | 1,000 |  | 0.730 ▲ [0.710, 0.750] |" in text
    assert "2 seeds, no interval, 1 of 3 failed" in text
    assert "<t>" not in text.replace(r"\<t\>", "")


def test_csv_has_a_line_for_each_arm_and_task(texts: dict[str, str]) -> None:
    rows = list(csv.DictReader(io.StringIO(texts[".csv"])))
    assert [row["arm"] for row in rows] == ["lora", "lora-fish", "lora-fish-rand", "lora-fish"]
    assert [row["family"] for row in rows] == ["", "dense", "dense", "choice"]
    fish, random, choice = rows[1:]
    assert (fish["task"], fish["n_ok"], fish["verdict"], fish["baseline"]) == (EVIL, "7", "better", "lora")
    assert float(fish["p_corrected"]) == pytest.approx(float(fish["p"]))  # the other arm has too few seeds for a p
    assert 0 < float(fish["difference_low"]) <= float(fish["raw_low"]) < float(fish["difference"])
    assert (random["low"], random["n_failed"], random["verdict"]) == ("", "1", "too few seeds")
    assert random["raw_low"] == ""
    assert random["remark"].startswith("2 seeds; at least 3 are needed.")
    assert (choice["baseline"], choice["n_pairs"], choice["mean"]) == ("lora-fish-rand", "2", "")


def test_the_command_writes_and_tells(tmp_path: Path) -> None:
    folder = write_experiment(
        tmp_path / "a", scores("lora", [0.5, 0.6, 0.7]), settings=config("t", ["lora"], [1, 2, 3])
    )
    (folder / "runs" / "torn.json").write_text("{")
    result = CliRunner().invoke(
        app, ["report", str(tmp_path), "--output", str(tmp_path / "out")], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert "torn.json is cut off" in result.output
    assert f"{tmp_path / 'out' / 'report.html'}" in result.output
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nothing", "does not exist; name the output folder of an experiment.\n"),
        ("reslts", "does not exist; name the output folder of an experiment. Did you mean 'results'?"),
        ("", "no readable run"),
        ("f", "is not a folder; name the output folder of an experiment.\n"),
    ],
)
def test_wrong_folders_are_exit_code_2_without_a_traceback(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "f").write_text("")
    (tmp_path / "results").mkdir()
    result = CliRunner().invoke(app, ["report", str(tmp_path / name)], catch_exceptions=False)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: report: ")
    assert expected in result.stderr


def test_an_output_that_cannot_be_made_is_exit_code_2(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path / "a", scores("lora", [0.5]))
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(
        app, ["report", str(folder), "--output", str(tmp_path / "file")], catch_exceptions=False
    )
    assert result.exit_code == 2
    assert "cannot write to" in result.stderr


def full_disk(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_exit_code_1_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_experiment(tmp_path / "a", scores("lora", [0.5, 0.6, 0.7]))
    write_page([folder])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(os, "fsync", full_disk)
    result = CliRunner().invoke(app, ["report", str(folder)], catch_exceptions=False)
    assert result.exit_code == 1
    assert "error: the disk is full" in result.stderr
    assert "--output" in result.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("text", ['{"experiment": "x", "config": {', "[]"])
def test_results_json_that_says_nothing_is_not_called_missing(tmp_path: Path, text: str) -> None:
    folder = write_experiment(tmp_path / "a", scores("lora", [0.5]))
    (folder / "results.json").write_text(text)
    experiments, notes = read_experiments([folder])
    assert len(experiments[0].runs) == 1
    assert any("holds no configuration that can be read" in note for note in notes)
    assert not any("There is no results.json" in note for note in notes)


def test_a_page_without_masks_needs_no_torch(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path / "a", scores("lora", [0.5]), settings=config("t", ["lora"], [1]))
    code = (
        "import sys; from pathlib import Path; from fish_tuning.experiments.report.page import write_page\n"
        f"write_page([Path({str(folder)!r})]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
