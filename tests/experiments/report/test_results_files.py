"""Files, tables, sentences and pictures from fake records."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest
from fakes import SEEDS, experiment, failed, kept, ok, scores

from fish_tuning.experiments.compare.conclusions import conclusion, differences
from fish_tuning.experiments.compare.summaries import summarize
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.report.results_files import report_notes, write_report
from fish_tuning.experiments.report.tables import (
    console_tables,
    difference_rows,
    difference_table,
    fact_text,
    human_bytes,
    table_rows,
)

RUNS = [*scores("lora", [0.5, 0.6, 0.7]), *scores("lora-fish", [0.6, 0.7, 0.8], kept=kept(1, 9))]
RUN_KEYS = {
    *("arm", "seed", "metric", "value", "trainable_parameters", "train_seconds", "fisher_seconds"),
    *("peak_memory_bytes", "optimizer_state_bytes", "adapter_bytes", "status"),
}


def test_a_complete_experiment_writes_every_file(tmp_path: Path) -> None:
    facts = {"task": "sst2", "notes": ["mind the gap"], "versions": {"torch": "2"}}
    written = write_report(experiment(), facts, RUNS, tmp_path / "new")
    names = ["results.json", "results.csv", "results.md", "metric.png", "kept.png"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(names)  # nothing unfinished is left
    data = json.loads(written[0].read_text())
    assert data["experiment"] == "trial"
    assert len(data["runs"]) == 6
    assert data["runs"][0].keys() >= RUN_KEYS
    (compared,) = data["comparisons"]
    assert (compared["arm"], compared["mean_difference"]) == ("lora-fish", pytest.approx(0.1))
    assert data["config"]["lora"]["init_lora_weights"] is True
    assert data["facts"]["versions"] == {"torch": "2"}
    rows = list(csv.DictReader(io.StringIO(written[1].read_text())))
    assert (rows[0]["arm"], rows[0]["value"], rows[0]["adapter_bytes"]) == ("lora", "0.5", "4321")
    text = written[2].read_text()
    for expected in (
        "start: init_lora_weights true, scored after 20 warm-up steps",
        "- seeds: 1, 2, 3",
        "- mind the gap",
        "![",
        "(kept.png)",
        "versions: torch 2",
    ):
        assert expected in text
    for picture in written[3:]:
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_experiment_has_no_pictures_and_says_so(tmp_path: Path) -> None:
    written = write_report(experiment(), {}, RUNS[:4], tmp_path)
    assert [path.suffix for path in written] == [".json", ".csv", ".md"]
    text = written[2].read_text()
    assert "4 of 6 runs are in" in text
    assert ".png" not in text


def test_failed_runs_are_in_every_file(tmp_path: Path) -> None:
    runs = [*RUNS[:3], *(failed("lora-fish", seed, "RuntimeError: a | b\nsecond line") for seed in SEEDS)]
    json_file, csv_file, markdown, *_ = write_report(experiment(), {}, runs, tmp_path)
    assert json.loads(json_file.read_text())["runs"][3]["error"].startswith("RuntimeError")
    assert csv_file.read_text().count("RuntimeError: a | b") == 3
    text = markdown.read_text()
    assert "| lora-fish | - | 3 of 3 failed | - |" in text
    assert "- lora-fish, seed 1: RuntimeError: a | b\n  second line" in text


def test_a_metric_that_is_not_a_number_leaves_valid_json(tmp_path: Path) -> None:
    runs = [*scores("lora", [math.nan, 0.6, 0.7]), *scores("lora-fish", [0.6, 0.7, 0.8])]
    written = write_report(experiment(), {}, runs, tmp_path)
    assert "NaN" not in written[0].read_text()
    assert json.loads(written[0].read_text())["runs"][0]["value"] is None
    assert "| too few seeds | 2 |" in written[2].read_text()


def test_table_has_the_columns_in_order() -> None:
    headers, rows = table_rows(summarize(RUNS))
    assert headers == [
        "arm",
        "trainable parameters, kept + head",
        "accuracy, mean [95 % interval]",
        "train s",
        "Fisher s",
        "peak memory (process)",
        "optimizer state",
        "adapter",
    ]
    assert rows[0] == ["lora", "1,000", "0.600 [0.352, 0.848]", "10.0", "0.0", "1.5 GB", "8.0 kB", "4.3 kB"]
    on_gpu = table_rows(summarize([ok("lora", 1, 0.5, peak_memory_of="gpu"), failed("lora-fish", 1)]))
    assert on_gpu[0][5] == "peak memory (GPU)"
    assert on_gpu[1][0][2] == "0.500"


@pytest.mark.parametrize(("width", "tables"), [(100, 1), (80, 2)])
def test_console_tables_fit_a_plain_terminal(width: int, tables: int) -> None:
    from rich.console import Console

    size = {"trainable_parameters": 234_567_890, "train_seconds": 12_345.6, "peak_memory_of": "process"}
    runs = [*scores("lora", [0.5, 0.6, 0.7], **size), *scores("lora-fish-rand", [-0.5, 0.6, 0.7], **size)]
    runs += [failed("lora-fish-rand", 4)]
    output = io.StringIO()
    made = console_tables(summarize(runs), width, title="[x] a title")
    assert len(made) == tables
    Console(file=output, width=width, force_terminal=False).print(*made)
    text = output.getvalue()
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= width
    for cell in ("[x] a title", "234,567,890", "0.600 [0.352, 0.848]", "12,345.6", "1.5 GB", "4.3 kB", "1 of 4"):
        assert cell in text


@pytest.mark.parametrize(
    ("size", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (2_340_000, "2.3 MB")],
)
def test_human_bytes(size: int | None, text: str) -> None:
    assert human_bytes(size) == text


def test_facts_read_well() -> None:
    assert fact_text({"a": 1, "b": 2}) == "a 1, b 2"
    assert fact_text({"a": 1, "b": ["x", "y"]}) == "a 1; b x, y"
    assert [fact_text(value) for value in (True, None, 12345, [])] == ["true", "none", "12,345", "none"]


DENSE = [0.50, 0.51, 0.52, 0.53, 0.54, 0.55, 0.56, 0.57]
BETTER = [value + 0.1 + shift / 1000 for shift, value in enumerate(DENSE)]


def cells(runs: list[RunRecord]) -> list[list[str]]:
    return difference_rows(differences(runs))[1]


def test_differences_are_a_table_and_the_conclusion_one_sentence() -> None:
    runs = [*scores("lora", DENSE), *scores("lora-fish", BETTER), *scores("lora-fish-rev", [0.1] * 8)]
    assert cells(runs) == [
        ["lora-fish", "lora", "+0.103", "[+0.101, +0.106]", "better", "8"],
        ["lora-fish-rev", "lora", "-0.435", "[-0.455, -0.415]", "worse", "8"],
        ["lora-fish", "lora-fish-rev", "+0.538", "[+0.516, +0.561]", "better", "8"],
    ]
    assert conclusion(runs) == "On this data set lora-fish is significantly ahead of lora and lora-fish-rev."
    worse = conclusion([*scores("lora", BETTER), *scores("lora-fish", DENSE)])
    assert worse == "On this data set lora-fish is significantly behind lora."


def test_what_is_told_of_differences_is_their_verdicts() -> None:
    runs = [*scores("lora", DENSE), *scores("lora-fish", BETTER), *scores("lora-fish-rand", [0.8, 0.3] * 4)]
    compared = differences(runs)
    assert [each.verdict for each in compared] == ["better", "no difference shown", "no difference shown"]
    for each in compared:  # the interval leaves out zero if and only if the verdict says so
        assert each.low is not None
        assert each.high is not None
        assert (each.low > 0 or each.high < 0) == (each.verdict in ("better", "worse"))
    assert conclusion(runs) == (
        "On this data set lora-fish is significantly ahead of lora, and not told apart from lora-fish-rand."
    )


def test_a_small_difference_is_told_with_the_digits_that_its_verdict_needs() -> None:
    small = [0.0004, 0.0005, 0.00045, 0.0005, 0.0004]
    (row,) = cells([*scores("lora", [0.9] * 5), *scores("lora-fish", [0.9 + value for value in small])])
    assert row[2:5] == ["+0.0004", "[+0.0004, +0.001]", "better"]


def test_nothing_is_called_a_win_that_is_not_significant() -> None:
    few = [*scores("lora", [0.5, 0.6]), *scores("lora-fish", [0.6, 0.701])]
    assert cells(few) == [["lora-fish", "lora", "+0.100", "-", "too few seeds", "2"]]
    text = conclusion(few)
    assert text == "On this data set lora-fish is not told apart from lora (2 seeds; at least 3 are needed)."
    noise = [*scores("lora", [0.5] * 6), *scores("lora-fish", [0.8, 0.3, 0.75, 0.4, 0.7, 0.35])]
    assert cells(noise)[0][4] == "no difference shown"
    assert conclusion(noise) == "On this data set lora-fish is not told apart from lora."
    equal = [*scores("lora", [0.5] * 3), *scores("lora-fish", [0.5] * 3)]
    assert cells(equal)[0][2:5:2] == ["0.000", "all pairs equal"]
    assert conclusion(equal) == "On this data set lora-fish is equal, in every pair, to lora."


def test_conclusion_of_counts_is_against_every_dense_arm_of_that_size() -> None:
    dense, better = [0.5, 0.51, 0.52, 0.5, 0.51], [0.7, 0.72, 0.71, 0.7, 0.73]
    runs = [
        *scores("value1", dense, kept_parameters=64),
        *scores("output1", [value + 0.1 for value in dense], kept_parameters=64),
        *scores("pool-fish@n64", better, kept_parameters=64),
        *scores("pool-fish-rand@n64", dense, kept_parameters=64),
    ]
    assert conclusion(runs) == (
        "On this data set pool-fish@n64 is significantly ahead of value1, output1 and pool-fish-rand@n64."
    )
    alone = conclusion(scores("pool-fish@n64", better, kept_parameters=64))
    assert "No dense arm of that size" in alone


def test_of_many_arms_the_conclusion_counts() -> None:
    runs = [*scores("lora", DENSE), *scores("lora-fish@0.5", BETTER), *scores("lora-fish@0.1", DENSE[::-1])]
    assert conclusion(runs) == (
        "On this data set, of the 2 differences of arms that scores choose, 1 are significantly above zero, 0 below, "
        "and 1 are not told apart from it."
    )


def test_conclusion_without_a_pair() -> None:
    assert "nothing to compare" in conclusion([ok("lora", 1, 0.5), failed("lora-fish", 1)])
    assert "nothing to compare" in conclusion([])
    assert "Only the head alone" in conclusion([ok("head", 1, 0.5)])
    apart = conclusion([ok("lora", 1, 0.5), ok("lora-fish", 2, 0.9)])
    assert "No seed finished in both" in apart


def test_conclusion_pairs_runs_whose_records_name_their_task_and_those_that_do_not() -> None:
    runs = [ok("lora", 1, 0.5, task="sst2", model="m"), ok("lora-fish", 1, 0.6), failed("lora-fish", 2)]
    assert cells(runs) == [["lora-fish", "lora", "+0.100", "-", "too few seeds", "1"]]


@pytest.mark.parametrize(
    ("method", "budget", "width"), [("lora", "", 80), ("serial_adapter", "@0.005", 80), ("lora", "@0.05", 70)]
)
def test_differences_fit_the_terminal(method: str, budget: str, width: int) -> None:
    from rich.console import Console

    arms = {f"{method}{selection}{budget if selection else ''}" for selection in ("", "-fish", "-fish-rand")}
    runs = [run for arm in sorted(arms) for run in scores(arm, DENSE if arm == method else BETTER)]
    runs += scores(f"{method}-fish-rev{budget}", [0.8, 0.3] * 4)
    output = io.StringIO()
    Console(file=output, width=width, force_terminal=False).print(difference_table(differences(runs), width))
    text = output.getvalue()
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= width
    for cell in (f"{method}-fish-rand{budget}", "[+0.101, +0.106]", "difference", "better", "equal"):
        assert cell in text


def test_notes_say_why_there_is_no_interval() -> None:
    config = experiment(seeds=[1])
    notes = report_notes(config, {}, summarize([ok("lora", 1, 0.5), ok("lora-fish", 1, 0.6)]))
    assert any("fewer than 3 seeds" in note for note in notes)
