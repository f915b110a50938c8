"""The page of the report: its structure, its words, and what it says where runs failed, are missing or are few."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fakes import failed, kept, ok, scores
from page_records import Node, config, parse, write_experiment

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.report.page import write_page

NONE = "\N{EN DASH}"
ARMS = ("lora", "lora-fish", "lora-fish-rand")
DENSE = [0.50, 0.51, 0.52, 0.53, 0.54, 0.55, 0.56, 0.57]
BETTER = [value + 0.1 + shift / 1000 for shift, value in enumerate(DENSE)]
MIXED = [value + shift for value, shift in zip(DENSE, [0.2, -0.04] * 4, strict=True)]


def complete(**changes: Any) -> list[RunRecord]:
    curve = [(10, 0.7), (20, 0.5)]
    return [
        *scores("lora", DENSE, loss_curve=curve, **changes),
        *scores("lora-fish", BETTER, loss_curve=curve, kept=kept(1, 9), fisher_seconds=2.0, **changes),
        *scores("lora-fish-rand", MIXED, loss_curve=curve, kept=kept(5, 5), **changes),
    ]


def page_of(folder: Path, *folders: Path) -> Node:
    write_page([folder, *folders])
    return parse((folder / "report.html").read_text())


def rows(table: Node) -> dict[str, list[str]]:
    return {row.one("th").text: [cell.text for cell in row.all("td")] for row in table.one("tbody").all("tr")}


def section(page: Node, name: str) -> Node:
    return page.one("section", id=name)


@pytest.fixture
def page(tmp_path: Path) -> Node:
    return page_of(
        write_experiment(tmp_path / "a", complete(), settings=config("trial", ARMS, range(1, 9)), task="sst2")
    )


def test_the_four_files_are_written_and_nothing_unfinished(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path / "a", complete())
    written, _ = write_page([folder], tmp_path / "deep" / "er")
    assert [path.name for path in written] == ["report.html", "report.md", "report.tex", "report.csv"]
    assert sorted(path.name for path in (tmp_path / "deep" / "er").iterdir()) == sorted(path.name for path in written)
    assert not (folder / "report.html").exists()


def test_the_page_stands_alone(page: Node, tmp_path: Path) -> None:
    text = (tmp_path / "a" / "report.html").read_text()
    drawn = re.sub(r"data:image/png;base64,[\w+/=]+", "", text)
    assert not re.findall(r"(?:https?:)?//[a-z]", drawn.replace("// In print", ""))
    assert not [node for tag in ("link", "img", "iframe", "object") for node in page.all(tag)]
    assert all("src" not in script.attributes for script in page.all("script"))


def test_headings_are_in_order_and_every_table_and_picture_is_named(page: Node) -> None:
    levels = [int(level) for level in re.findall(r"<h([1-6])", _serialize(page))]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.one("html").attributes["lang"] == "en"
    assert page.all("table")
    for table in page.all("table"):
        assert table.one("caption").text
        assert all(header.attributes.get("scope") in ("row", "col") for header in table.all("th"))
    pictures = page.all("svg", role="img")
    assert len(pictures) >= 8
    for picture in pictures:
        assert picture.attributes["aria-label"]
        assert picture.all("title")
        assert picture.one("desc").text
    assert all("aria-hidden" in picture.attributes for picture in page.all("svg") if picture not in pictures)


def test_no_number_of_a_picture_is_broken(page: Node) -> None:
    for node in page.all("svg"):
        for value in (value for each in [node, *node._below()] for value in each.attributes.values()):
            assert not re.search(r"\bnan\b|\binf\b|None", value)


def test_question_answer_and_table_of_a_complete_experiment(page: Node) -> None:
    assert "3 arms of lora compared on sst2 with tiny, with 8 seeds (1 to 8)" in page.one("header").text
    answer = section(page, "answer")
    verdicts = [[cell.text for cell in row.all("td")] for row in answer.one("tbody").all("tr")]
    assert [row[0] for row in verdicts] == ["lora", "lora", "as many entries chosen at random"]
    assert [row[-1] for row in verdicts] == ["▲ better", "no difference shown", "no difference shown"]
    assert verdicts[0][1].startswith("+0.103 [+0.101, +0.106]")
    narrow = [row.one("th").one("small", class_="at-narrow").text for row in answer.one("tbody").all("tr")]
    assert narrow == [f"against {row[0]}" for row in verdicts]  # on a phone, whose table has no column for it
    assert "Not complete" not in answer.text
    table = rows(section(page, "scores").one("table"))
    assert list(table) == list(ARMS)
    assert table["lora"] == ["1,000", "0.535 [0.515, 0.555]"]
    marks = section(page, "scores").one("tbody").all("span", role="img")
    assert [mark.attributes["aria-label"] for mark in marks] == ["significantly better than the dense arm"]


def test_what_is_not_significant_is_no_win_in_words_or_colour(page: Node) -> None:
    table = section(page, "differences").one("table")
    cells = {row.one("th").text.split()[0]: row.all("td")[1] for row in table.one("tbody").all("tr")}
    assert cells["lora-fish"].text == "▲ better"
    assert cells["lora-fish"].all("span", class_="mark-up")
    assert cells["lora-fish-rand"].text == "no difference shown"
    assert not cells["lora-fish-rand"].all("span", class_="mark-up")
    assert rows(table)["lora-fish-rand minus lora"][3] == "4 / 0 / 4"


def test_choices_are_a_family_of_their_own(page: Node) -> None:
    choice = section(page, "choice")
    (row,) = choice.one("table").one("tbody").all("tr")
    assert row.one("th").text == "lora-fish minus lora-fish-rand"
    cells = [cell.text for cell in row.all("td")]
    assert cells[0].startswith("+0.02")
    assert cells[1:4] == ["no difference shown", "8", "4 / 0 / 4"]
    assert cells[4] == cells[5]  # one comparison: nothing to correct for, whatever the other table holds
    assert "corrected over them alone" in choice.text
    assert "does it matter how they are chosen?" in page.one("header").text
    assert "lora-fish \N{MINUS SIGN} random" in [text.text for text in choice.all("svg")[0].all("text")]


def test_without_controls_there_is_no_question_of_choice(tmp_path: Path) -> None:
    page = page_of(write_experiment(tmp_path / "a", [*scores("lora", DENSE), *scores("lora-fish", BETTER)]))
    assert not page.all("section", id="choice")
    assert "how they are chosen" not in page.one("header").text


def test_an_interval_leaves_out_zero_where_the_verdict_says_so(page: Node) -> None:
    for name in ("answer", "differences", "choice"):
        for row in section(page, name).one("table").one("tbody").all("tr"):
            bounds = re.search(r"\[(\S+), (\S+)\]", row.text.replace("\N{MINUS SIGN}", "-"))
            assert bounds is not None
            out = float(bounds[1]) > 0 or float(bounds[2]) < 0
            assert out == row.one("td", class_="verdict").text.endswith(("better", "worse"))


def test_pictures_of_masks_and_costs(page: Node) -> None:
    masks = section(page, "masks")
    assert [figure.one("h3").text for figure in masks.all("figure")] == ["lora-fish", "lora-fish-rand"]
    fish = masks.all("svg")[0]
    assert [text.text for text in fish.all("text")][-2:] == ["10", "90"]
    factors = rows(masks.all("table")[0])
    assert factors["lora-fish"] == ["10", "90", "10 : 90"]
    assert "no mask files" in masks.text
    costs = rows(section(page, "costs").one("table"))
    assert costs["lora-fish"] == ["8", "2.0", "10.0", "1.5 GB process", "8.0 kB", "4.3 kB"]


def test_configuration_is_there_to_repeat_it(page: Node) -> None:
    details = section(page, "repeat").one("details")
    assert "methods_to_run: [lora, lora-fish, lora-fish-rand]" in details.one("pre").text
    assert "fish-tuning run trial.yaml" in details.text
    assert "sst2" in details.one("dl").text


def test_what_comes_from_runs_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> & \"quoted\" 'text' {{ 7 * 7 }}"
    runs = [
        *scores("lora", DENSE[:3], task=evil, model=evil),
        failed("lora-fish", 1, evil),
        ok("lora-<b>x", 1, 0.5, task=evil, kept=[replace(kept(1, 2)[0], module=evil)]),
    ]
    runs = [replace(run, task=evil, model=evil) for run in runs]
    folder = write_experiment(tmp_path / "a", [replace(run, arm=run.arm.replace("/", "")) for run in runs])
    page = page_of(folder)
    assert not page.all("script")
    assert not page.all("b")
    assert evil in section(page, "failures").one("ul", class_="errors").text
    assert "lora-<b>x" in rows(section(page, "scores").one("table"))


def test_failed_and_missing_runs_are_seen_as_such(tmp_path: Path) -> None:
    runs = [
        *scores("lora", DENSE[:3]),
        ok("lora-fish", 1, 0.6),
        failed("lora-fish", 2, "it broke"),
        failed("lora-fish", 3, "it broke"),
    ]
    folder = write_experiment(tmp_path / "a", runs, settings=config("trial", ARMS, [1, 2, 3, 4]))
    page = page_of(folder)
    table = rows(section(page, "scores").one("table"))
    assert table["lora"][1] == "0.510 [0.485, 0.535] 1 of 4 not run"
    assert table["lora-fish"][1] == "0.600 1 seed, no interval 2 of 4 failed 1 of 4 not run"
    assert table["lora-fish-rand"] == [NONE, f"{NONE} not run"]
    assert "2 runs failed. 6 planned runs not there yet." in section(page, "answer").text
    failures = section(page, "failures").text
    assert "lora-fish on trial, seeds 2, 3 it broke" in failures
    assert "lora-fish-rand on trial: seeds 1, 2, 3, 4" in failures


def test_few_seeds_give_no_interval_and_say_why(tmp_path: Path) -> None:
    page = page_of(write_experiment(tmp_path / "a", [ok("lora", 1, 0.5), ok("lora-fish", 1, 0.9)]))
    assert rows(section(page, "scores").one("table"))["lora-fish"][1] == "0.900 1 seed, no interval"
    assert "too few seeds" in section(page, "answer").text
    differences = section(page, "differences")
    assert "[" not in rows(differences.one("table"))["lora-fish minus lora"][0]
    assert "at least 3 are needed" in differences.text
    assert not page.all("g", class_="interval")
    assert "with 95 % intervals" not in _serialize(page)
    assert not page.one("main").all("span", class_="mark-up") or "better" not in section(page, "answer").text


def test_a_mean_without_an_interval_says_why(tmp_path: Path) -> None:
    for task, values in (("cola", [0.5, 0.6, 0.7]), ("rte", [0.5, 0.6]), ("wnli", [0.563] * 3)):
        write_experiment(tmp_path / "all" / task, scores("lora", values, task=task))
    table = rows(section(page_of(tmp_path / "all"), "scores").one("table"))
    assert table["lora"][2:] == [
        "0.550 2 seeds, no interval",
        "0.563 all seeds equal",
        "0.571 a task has 2 seeds, no interval",
    ]


def test_maps_have_a_scale_for_each_budget(tmp_path: Path) -> None:
    arms = {"lora-fish@0.5": kept(2, 10), "lora-fish@0.01": kept(0, 1), "lora-fish-rand@0.01": kept(1, 1)}
    page = page_of(write_experiment(tmp_path / "a", [ok(arm, 1, 0.5, kept=each) for arm, each in arms.items()]))
    masks = section(page, "masks")
    assert [scale.text for scale in masks.all("div", class_="scale")] == ["@0.01 0 % 10 %", "@0.5 0 % 100 %"]
    assert "Maps of one budget have one scale" in masks.text


def test_curves_of_one_mark_are_told_apart_by_their_budget(tmp_path: Path) -> None:
    arms = ("lora", "lora-fish@0.5", "lora-fish@0.01")
    page = page_of(write_experiment(tmp_path / "a", [ok(arm, 1, 0.5, loss_curve=[(1, 0.7), (2, 0.6)]) for arm in arms]))
    curves = section(page, "curves").all("svg", class_="curves")[0]
    assert [mark.one("text").text for mark in curves.all("g", class_="budget")] == ["0.01", "0.5"]


def test_one_arm_and_nothing_but_failures_still_make_a_page(tmp_path: Path) -> None:
    alone = page_of(write_experiment(tmp_path / "a", scores("lora", DENSE)))
    assert "nothing to compare" in section(alone, "answer").text
    assert "no other arm" in section(alone, "differences").text
    broken = page_of(write_experiment(tmp_path / "b", [failed("lora", 1), failed("lora-fish", 1)]))
    assert rows(section(broken, "scores").one("table"))["lora"] == [NONE, f"{NONE} 1 of 1 failed"]
    assert "No run finished" in section(broken, "costs").text


def test_a_metric_that_is_not_a_number_counts_as_failed(tmp_path: Path) -> None:
    runs = [*scores("lora", [0.5, 0.6, float("nan")]), *scores("lora-fish", [0.5, 0.6, 0.7])]
    page = page_of(write_experiment(tmp_path / "a", runs))
    assert "1 of 3 failed" in rows(section(page, "scores").one("table"))["lora"][1]
    assert "The metric is not a number." in section(page, "failures").text


def test_tasks_are_columns_with_their_average(tmp_path: Path) -> None:
    for shift, task in enumerate(("rte", "cola")):
        runs = complete(task=task)
        moved = [replace(run, value=(run.value or 0) + shift / 10) for run in runs]
        write_experiment(tmp_path / "all" / task, moved, settings=config(task, ARMS, range(1, 9)))
    page = page_of(tmp_path / "all")
    table = section(page, "scores").one("table")
    assert [header.text.split()[0] for header in table.one("thead").all("th")][2:] == ["cola", "rte", "average"]
    assert [cell.split()[0] for cell in rows(table)["lora"][1:]] == ["0.635", "0.535", "0.585"]
    assert len(section(page, "curves").all("svg", class_="curves")) == 2
    apart = section(page, "differences").one("details").one("table")
    assert len(apart.one("tbody").all("tr")) == 4
    choices = section(page, "choice").one("details").one("table")
    assert list(rows(choices)) == ["lora-fish \N{MINUS SIGN} random"]
    assert len(choices.one("tbody").all("tr")) == 2


def test_an_arm_that_lacks_a_task_has_no_average(tmp_path: Path) -> None:
    write_experiment(tmp_path / "all" / "rte", complete(task="rte"))
    write_experiment(tmp_path / "all" / "cola", [*scores("lora", DENSE, task="cola")])
    table = rows(section(page_of(tmp_path / "all"), "scores").one("table"))
    assert table["lora-fish"][1:] == [NONE, table["lora-fish"][2], f"{NONE} not all tasks"]
    assert table["lora"][3].startswith("0.535")


def test_without_a_readable_run_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        write_page([tmp_path / "nothing"])
    with pytest.raises(ConfigurationError, match="no readable run"):
        write_page([tmp_path])


def _serialize(node: Node) -> str:
    inner = "".join(child if isinstance(child, str) else _serialize(child) for child in node.children)
    return f"<{node.tag}>{inner}"


def test_differences_on_each_task_have_their_interval_below_them(tmp_path: Path) -> None:
    """On a phone the table is as narrow as the others."""
    for task in ("sst2", "mrpc"):
        write_experiment(tmp_path / task, complete(task=task), settings=config("trial", ARMS, range(1, 9)), task=task)
    (table,) = (
        section(page_of(tmp_path, tmp_path / "sst2", tmp_path / "mrpc"), "differences").one("details").all("table")
    )
    assert "95 % interval, corrected" in table.one("thead").text.replace("\N{NO-BREAK SPACE}", " ")
    differences = [row.all("td")[1] for row in table.one("tbody").all("tr")]
    assert differences
    assert all(cell.one("small").text.startswith("[") for cell in differences)
