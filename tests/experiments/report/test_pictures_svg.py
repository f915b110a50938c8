"""Pictures inside a page: safe, the same every time, in the page's colours, and apart from one another."""

from __future__ import annotations

import re
from collections.abc import Callable

import matplotlib
import pytest
from page_records import Node, parse

from fish_tuning.experiments.report.look import PALETTE, looks
from fish_tuning.experiments.report.pictures.canvas import Picture, png
from fish_tuning.experiments.report.pictures.curves import curves_picture
from fish_tuning.experiments.report.pictures.heat import heat_picture
from fish_tuning.experiments.report.pictures.marks import swatch
from fish_tuning.experiments.report.pictures.rows import (
    Difference,
    Seconds,
    Words,
    differences_picture,
    seconds_picture,
)
from fish_tuning.experiments.report.pictures.score_size import Point, score_size_picture
from fish_tuning.experiments.report.pictures.svg import svg

EVIL = "lora-$x^{2$ \\frac{ </script><b>&amp; \x00\x07\x1b[31m\ud800 \"'" + "long" * 40
ARMS = [EVIL, "lora-fish@0.1", "dora"]
LOOKS = looks(ARMS)


def score_size() -> Picture:
    points = [Point(arm, 10 * number, 0.5, 0.4, 0.6) for number, arm in enumerate(ARMS)]
    return score_size_picture(points, LOOKS, EVIL, "kept entries", 700, 300)


def differences() -> Picture:
    rows = [Difference(arm, 0.1, 0.05, 0.15, LOOKS[arm], f"{arm}: ahead") for arm in ARMS]
    return differences_picture(rows, Words(EVIL, "worse", "better"), 330)


def seconds() -> Picture:
    return seconds_picture([Seconds(arm, 1.0, 2.0) for arm in ARMS], EVIL, 700)


def curves() -> Picture:
    return curves_picture({arm: [(1, 0.7), (2, 0.5)] for arm in ARMS}, LOOKS, EVIL, 700, 300)


def heat() -> Picture:
    return heat_picture({EVIL: {(0, EVIL): 0.5, (None, "query"): 0.0}}, 0.5, titles=False)


ALL = pytest.mark.parametrize("draw", [score_size, differences, seconds, curves, heat])


def node(text: str) -> Node:
    return parse(text).one("svg")


@ALL
def test_a_hostile_name_is_only_text(draw: Callable[[], Picture]) -> None:
    text = svg(draw(), "one")
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]", text)
    picture = node(text)
    assert not picture.all("b")
    assert not picture.all("script")
    assert "lora-$x^{2$ \\frac{ </script><b>&amp;" in picture.attributes["aria-label"]
    assert picture.attributes["role"] == "img"
    assert picture.all("title")[0].text
    assert picture.one("desc").text


@ALL
def test_it_is_the_same_every_time(draw: Callable[[], Picture]) -> None:
    assert svg(draw(), "one") == svg(draw(), "one")
    assert png(draw()) == png(draw())


@ALL
def test_two_in_a_page_share_no_id_and_each_refers_to_its_own(draw: Callable[[], Picture]) -> None:
    ids = []
    for name in ("one", "two"):
        text = svg(draw(), name)
        there = re.findall(r'\sid="([^"]*)"', text)
        assert len(set(there)) == len(there)
        assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', text)) == set(there)
        ids += there
    assert len(set(ids)) == len(ids)


@ALL
def test_colours_and_font_are_the_page_s(draw: Callable[[], Picture]) -> None:
    text = svg(draw(), "one")
    for name, colour in PALETTE.items():
        assert colour.light not in text, name
    assert re.search(r"var\(--(?:muted|dense)\)", text)
    assert "font-family" not in text
    assert "<style" not in text  # matplotlib's would hold for the whole page
    assert "<metadata" not in text


@ALL
def test_no_user_setting_changes_it_and_none_is_changed(draw: Callable[[], Picture]) -> None:
    before = svg(draw(), "one")
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 30, "axes.facecolor": "black", "axes.grid": True}):
        theirs = dict(matplotlib.rcParams)
        assert svg(draw(), "one") == before
        assert dict(matplotlib.rcParams) == theirs


def test_text_stays_text_where_it_is_drawn() -> None:
    texts = [text.text for text in node(svg(differences(), "one")).all("text")]
    assert "lora-fish@0.1" in texts
    assert "better \N{RIGHTWARDS ARROW}" in texts


def test_who_points_at_a_mark_or_its_interval_is_told_the_row() -> None:
    picture = node(svg(differences(), "one"))
    for part in ("mark", "interval"):
        told = [group.one("title").text for group in picture.all("g", class_=part)]
        assert told[1:] == ["lora-fish@0.1: ahead", "dora: ahead"]


def test_a_swatch_is_hidden_from_who_hears_the_page() -> None:
    picture = node(svg(swatch(LOOKS["dora"]), "swatch"))
    assert picture.attributes["aria-hidden"] == "true"
    assert not picture.all("title")
    assert not [each for each in picture._below() if "id" in each.attributes]  # a legend may stand in a page twice
    assert (picture.attributes["width"], picture.attributes["viewbox"]) == ("16", "0 0 16 16")


def test_scoring_is_hatched_and_training_solid() -> None:
    picture = node(svg(seconds(), "one"))
    assert len(picture.all("pattern")) == 1
    for part, hatched in (("scoring", True), ("training", False)):
        bars = picture.all("g", class_=part)
        assert [bar.one("title").text.partition(": ")[2] for bar in bars] == ["1.0 s scoring, 2.0 s training"] * 3
        assert all(("url(#" in bar.one("path").attributes["style"]) is hatched for bar in bars)
