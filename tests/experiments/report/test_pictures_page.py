"""The pictures of the page: which there are, at which widths, and what is said of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fakes import kept, ok, scores
from page_records import Node, parse, write_experiment

from fish_tuning.experiments.records.run_record import KeptShare, RunRecord
from fish_tuning.experiments.report.look import PALETTE
from fish_tuning.experiments.report.page import write_page

CURVE = [(1, 0.7), (2, 0.5)]


def arms(values: tuple[float, ...] = (0.5, 0.6, 0.7), **changes: Any) -> list[RunRecord]:
    size = {"kept_parameters": 900, "head_parameters": 100, "loss_curve": CURVE} | changes
    return [
        *scores("lora", values, **size),
        *scores("lora-fish", values, kept=kept(1, 9), **size),
        *scores("lora-fish-rand", values, kept=kept(5, 5), **size),
        *scores("head", values, **(size | {"kept_parameters": size["kept_parameters"] and 0})),
    ]


def page_of(folder: Path) -> Node:
    write_page([folder])
    return parse((folder / "report.html").read_text())


@pytest.fixture
def page(tmp_path: Path) -> Node:
    return page_of(write_experiment(tmp_path / "a", arms(), task="sst2"))


def said(page: Node, section: str) -> list[str]:
    return [text.text for text in page.one("section", id=section).all("text")]


def test_the_axis_says_what_it_counts(tmp_path: Path, page: Node) -> None:
    assert said(page, "parameters").count("kept entries, without the head (log scale)") == 2  # wide and narrow
    older = page_of(write_experiment(tmp_path / "b", arms(kept_parameters=None)))
    assert "trainable parameters, head included (log scale)" in said(older, "parameters")
    assert not [text for text in said(older, "parameters") if "kept" in text]


def test_the_head_alone_has_its_place(page: Node) -> None:
    section = page.one("section", id="parameters")
    assert "A line joins" not in section.text
    picture = section.all("svg", class_="score-size")[0]
    assert "head: 0 kept entries, without the head, 0.600" in picture.one("desc").text
    assert "0" in [text.text for text in picture.all("text")]


def test_one_task_is_drawn_large_and_for_two_widths(page: Node) -> None:
    for section, kind in (("parameters", "score-size"), ("differences", "differences"), ("curves", "curves")):
        pictures = page.one("section", id=section).all("svg", class_=kind)
        assert [picture.attributes["width"] for picture in pictures] == ["700", "330"], section


def test_of_several_tasks_the_average_is_large_and_each_task_small(tmp_path: Path) -> None:
    for task in ("cola", "rte"):
        write_experiment(tmp_path / "all" / task, arms(task=task))
    page = page_of(tmp_path / "all")
    widths = {
        section: [svg.attributes["width"] for svg in page.one("section", id=section).all("svg", class_=kind)]
        for section, kind in (("parameters", "score-size"), ("curves", "curves"))
    }
    assert widths == {"parameters": ["700", "330", "330", "330"], "curves": ["330", "330"]}
    captions = [caption.text for caption in page.one("section", id="parameters").all("figcaption")]
    assert captions[0].startswith("average over tasks: mean of the metrics . Means with 95 % intervals.")


def test_no_caption_claims_an_interval_that_is_not_drawn(tmp_path: Path) -> None:
    page = page_of(write_experiment(tmp_path / "a", arms(values=(0.5, 0.6))))
    assert not page.all("g", class_="interval")
    captions = [caption.text for caption in page.all("figcaption")]
    assert [text for text in captions if "without intervals" in text]
    assert not [text for text in captions if "95" in text]


def test_ids_of_the_whole_page_are_its_own_and_found(page: Node) -> None:
    ids = [node.attributes["id"] for node in page._below() if "id" in node.attributes]
    assert len(set(ids)) == len(ids)
    values = [value for node in page._below() for value in node.attributes.values()]
    used = {name for value in values for name in re.findall(r"url\(#([\w-]+)\)", value)}
    used |= {node.attributes["href"][1:] for node in page.all("use")}
    assert used
    assert used <= set(ids)


def test_the_page_sets_every_colour_that_a_picture_names(tmp_path: Path, page: Node) -> None:
    text = (tmp_path / "a" / "report.html").read_text()
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    assert {"dense", "fish", "fish-rand", "head"} <= used
    assert used <= set(re.findall(r"--([\w-]+): ", text))
    for name in set(PALETTE):
        assert text.count(f"--{name}: ") >= 2, name  # in the light and in the dark


def test_each_look_is_in_the_legend_once(tmp_path: Path) -> None:
    names = ("lora", "lora-fish@0.1", "lora-fish@0.5", "lora-fish-rand@0.1")
    page = page_of(write_experiment(tmp_path / "a", [ok(arm, 1, 0.5) for arm in names]))
    legend = page.one("section", id="parameters").one("ul", class_="legend")
    assert [item.one("span").text for item in legend.all("li")] == [
        "lora",
        "lora-fish@0.1, @0.5",
        "lora-fish-rand@0.1",
    ]
    assert len({item.one("svg").one("path").attributes["d"] for item in legend.all("li")}) == 3
    assert "A line joins the budgets of one arm." in page.one("section", id="parameters").text


def test_runs_without_a_size_have_no_such_picture(tmp_path: Path) -> None:
    runs = [ok("lora", 1, 0.5, trainable_parameters=None), ok("lora-fish", 1, 0.5, trainable_parameters=None)]
    assert not page_of(write_experiment(tmp_path / "a", runs)).all("section", id="parameters")


def test_a_page_of_many_large_maps_stays_small(tmp_path: Path) -> None:
    shares = [KeptShare(layer, f"m{m}.lora_A", layer * m, 1000) for layer in range(24) for m in range(8)]
    runs = [ok(arm, 1, 0.5, kept=shares) for arm in ("lora-fish", "lora-fish-rand", "lora-fish-rev")]
    page_of(write_experiment(tmp_path / "a", runs))
    assert (tmp_path / "a" / "report.html").stat().st_size < 300_000
