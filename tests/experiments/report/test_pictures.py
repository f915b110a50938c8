"""The pictures of a results folder, and what each shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fakes import failed, kept, ok, scores
from test_pictures_look import contrast

from fish_tuning.experiments.report.look import PALETTE, looks
from fish_tuning.experiments.report.pictures.canvas import Picture, tick_text
from fish_tuning.experiments.report.pictures.curves import curves_picture, mean_curve
from fish_tuning.experiments.report.pictures.folder import draw_pictures, kept_heat_maps
from fish_tuning.experiments.report.pictures.heat import heat_picture, scale_colours
from fish_tuning.experiments.report.pictures.metric import metric_picture

ARMS = ["lora", "lora-fish", "lora-fish-rand"]


def texts(picture: Picture) -> list[str]:
    return [text.get_text() for text in picture.figure.axes[0].texts]


def test_the_metric_shows_failed_and_absent_arms() -> None:
    runs = [*scores("lora", [0.5, 0.6, 0.7]), failed("lora-fish", 1)]
    picture = metric_picture(ARMS, runs)
    assert texts(picture) == [
        *("0.600", "lora", "1,000 trainable"),
        *("failed", "lora-fish", "1 failed"),
        *("not run", "lora-fish-rand"),
    ]
    assert len(picture.figure.axes[0].collections[0].get_offsets()) == 3  # a dot for each seed


def test_the_metric_tells_kept_entries_where_they_are_known() -> None:
    runs = [ok("lora", 1, 0.5, kept_parameters=3072), ok("head", 1, 0.4, kept_parameters=0)]
    assert [text for text in texts(metric_picture(["lora", "head"], runs)) if "kept" in text] == [
        "3,072 kept",
        "0 kept",
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([[0.5, 0.6, 0.7], [0.1, 0.2, 0.3]], "means with 95 % intervals."),
        ([[0.5, 0.6, 0.7], [0.1]], "means with 95 % intervals where there are any."),
        ([[0.5, 0.6, 0.7], [0.2, 0.2, 0.2]], "means with 95 % intervals where there are any."),
        ([[0.5], [0.1]], "means without intervals."),
    ],
)
def test_a_caption_claims_an_interval_where_one_is_drawn(values: list[list[float]], words: str, tmp_path: Path) -> None:
    runs = [*scores("lora", values[0]), *scores("lora-fish", values[1])]
    (caption,) = draw_pictures(ARMS[:2], runs, tmp_path).values()
    assert caption == f"accuracy of every arm. Dots: seeds; marks: {words}"
    picture = metric_picture(ARMS[:2], runs)
    drawn = [line for line in picture.figure.axes[0].lines if str(line.get_gid()).startswith("interval")]
    assert len(drawn) == ("with 95" in words) * (1 if "any" in words else 2)


def test_what_is_not_a_number_is_not_drawn() -> None:
    runs = [*scores("lora", [0.5, 0.6]), ok("lora-fish", 1, float("nan")), ok("lora-fish-rand", 1, float("inf"))]
    shown = texts(metric_picture(ARMS, runs))
    assert shown.count("failed") == 2
    assert not [text for text in shown if "nan" in text or "inf" in text]


def test_what_rounds_to_nothing_has_no_minus() -> None:
    assert texts(metric_picture(["lora"], [ok("lora", 1, -0.0004)]))[0] == "0.000"
    assert texts(metric_picture(["lora"], [ok("lora", 1, -0.004)]))[0] == "\N{MINUS SIGN}0.004"


def test_an_arm_has_one_colour_and_mark_in_every_picture() -> None:
    runs = scores("lora-fish-rand", [0.5, 0.6, 0.7])
    curve = {"lora-fish-rand": [(1, 0.5), (2, 0.4)]}
    look = looks(["lora-fish-rand"])
    for picture in (metric_picture(["lora-fish-rand"], runs), curves_picture(curve, look, "loss", 700, 300)):
        (mark,) = [line for line in picture.figure.axes[0].lines if str(line.get_gid()).startswith("mark")]
        assert (mark.get_markerfacecolor(), mark.get_marker()) == (PALETTE["fish-rand"].light, "D")


def test_the_kept_entries_are_mean_shares_on_one_scale() -> None:
    runs = [ok("lora-fish", 1, 0.5, kept=kept(1, 9)), ok("lora-fish", 2, 0.5, kept=kept(3, 9)), ok("lora", 1, 0.5)]
    runs += [ok("lora-fish-rand", 1, 0.5, kept=kept(5, 5)), failed("lora-fish-rand", 2)]
    picture = kept_heat_maps(ARMS, runs)
    assert picture is not None
    fish, rand = (axes for axes in picture.figure.axes if axes.images)
    shares = fish.images[0].get_array()
    assert shares[0, 0] == pytest.approx(0.2)
    assert shares[1, 1] == pytest.approx(0.9)
    assert shares.mask.tolist() == [[False, True], [True, False]]  # modules that a layer lacks
    assert fish.images[0].get_clim() == rand.images[0].get_clim() == (0, 0.9)
    assert [text.get_text() for text in fish.texts] == ["layer", "20", "90"]
    assert [label.get_text() for label in fish.get_yticklabels()] == ["query.lora_A", "query.lora_B"]
    assert [label.get_text() for label in fish.get_xticklabels()] == ["0", "1"]
    assert [text.get_text() for text in picture.figure.texts] == ["lora-fish", "lora-fish-rand"]
    assert kept_heat_maps(["lora"], runs) is None


def test_a_map_in_which_nothing_is_kept_is_drawn() -> None:
    picture = heat_picture({"lora-fish": {(None, "dense"): 0.0}}, 0.0)
    assert picture.description == "1 modules in 1 layers; most is kept of dense, outside the layers: 0 %"


def test_numbers_can_be_read_on_every_colour_of_the_scale() -> None:
    steps = 40
    maps = {"lora-fish": {(0, f"m{step:02}"): step / steps for step in range(steps + 1)}}
    (axes,) = heat_picture(maps, 1.0, titles=False).figure.axes
    inks = [text.get_color() for text in axes.texts[1:]]
    for ink, ground in zip(inks, scale_colours(steps + 1), strict=True):
        assert contrast(ink, ground) >= 4.4
    assert not set(inks) & {colour.light for colour in PALETTE.values()}  # or a page in the dark would change them


def test_the_scale_gets_steadily_lighter() -> None:
    light = [contrast(colour, "#000000") for colour in scale_colours()]
    assert light == sorted(light)


def test_a_curve_is_the_mean_of_the_steps_that_all_seeds_logged() -> None:
    curves = ([(10, 0.8), (20, 0.6), (30, 0.5)], [(10, 0.6), (20, float("nan"))])
    runs = [ok("lora", seed, 0.5, loss_curve=curve) for seed, curve in enumerate(curves)]
    assert mean_curve(runs) == [(10, pytest.approx(0.7))]
    assert mean_curve(runs[1:]) == [(10, 0.6)]
    assert mean_curve([ok("lora", 1, 0.5)]) == []


def test_arms_that_only_differ_by_their_budget_have_it_at_their_marks() -> None:
    drawn = {arm: [(1, 0.5), (2, 0.4)] for arm in ("lora", "lora-fish@0.5", "lora-fish@0.01")}
    picture = curves_picture(drawn, looks(list(drawn)), "loss", 700, 300)
    assert texts(picture) == ["0.5", "0.01"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (-0.0, "0"), (0.05, "0.05"), (-0.5, "\N{MINUS SIGN}0.5"), (12_000, "12k"), (3.5e6, "3.5M"), (2e9, "2B")],
)
def test_ticks_are_short(value: float, text: str) -> None:
    assert tick_text(value) == text


def test_matplotlib_is_imported_when_something_is_drawn() -> None:
    code = (
        "import sys, fish_tuning.experiments.report.page, fish_tuning.experiments.report.results_files\n"
        "import fish_tuning.experiments.report.pictures.folder; print('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
