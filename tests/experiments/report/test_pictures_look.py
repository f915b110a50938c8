"""Looks of arms, and labels."""

from __future__ import annotations

from itertools import pairwise

import pytest

from fish_tuning.experiments.config.arm_names import SELECTIONS
from fish_tuning.experiments.report.look import LONGEST_LABEL, PALETTE, label, looks, style_sheet

ARMS = ["lora", *(f"lora-{suffix}" for suffix in SELECTIONS), "head"]


def test_each_arm_of_a_budget_has_a_colour_a_mark_and_dashes_of_its_own() -> None:
    found = list(looks(ARMS).values())
    for told in ("colour", "mark", "dashes"):
        assert len({getattr(look, told) for look in found}) == len(ARMS), told


def test_a_look_does_not_depend_on_which_other_arms_there_are() -> None:
    everything = looks(ARMS)
    for arm in ARMS:
        assert looks([arm, "lora"])[arm] == everything[arm]
        assert looks(["lora", arm])[arm] == everything[arm]


def test_budgets_of_an_arm_share_its_look() -> None:
    found = looks(["lora-fish@0.1", "lora-fish@top2", "lora-fish-rand@0.1"])
    assert found["lora-fish@0.1"] == found["lora-fish@top2"] != found["lora-fish-rand@0.1"]


def test_several_methods_are_told_apart_by_marks_and_selections_by_signs() -> None:
    arms = [f"{method}{suffix}" for method in ("lora", "dora", "loha") for suffix in ("", "-fish", "-fish-rand")]
    found = looks([*arms, "head"])
    assert len({(look.mark, look.sign) for look in found.values()}) == len(arms) + 1  # without their colours
    assert found["dora-fish"].mark == found["dora"].mark != found["lora"].mark
    assert found["dora-fish"].colour == found["lora-fish"].colour
    assert found["head"] == looks(["head"])["head"]


def test_selections_of_a_user_are_told_apart() -> None:
    found = looks(["lora", "lora-mine", "lora-yours", "lora-fish"])
    assert found["lora-mine"].mark != found["lora-yours"].mark
    assert len({look.mark for look in found.values()}) == 4


def test_colours_stand_out_and_each_is_recognised() -> None:
    assert len({colour.light for colour in PALETTE.values()}) == len(PALETTE)
    for name, colour in PALETTE.items():
        assert f"--{name}: {colour.light};" in style_sheet()
        if name not in ("ground", "band", "grid"):
            for ink, ground in zip(colour, PALETTE["ground"], strict=True):
                assert contrast(ink, ground) >= 2.95, name


def contrast(one: str, other: str) -> float:
    low, high = sorted(luminance(colour) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return sum(weight * each for weight, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("lora-fish@0.1", "lora-fish@0.1"),
        ("two\nlines\tand  more", "two lines and more"),
        ("bell\x07 and \x1b[31mred\ud800", "bell\ufffd and \ufffd[31mred\ufffd"),
        ("$x^2$ </script>", "$x^2$ </script>"),
    ],
)
def test_labels_are_one_line_of_what_can_be_printed(name: str, shown: str) -> None:
    assert label(name) == shown


def test_of_a_long_label_both_ends_stay() -> None:
    name = "begin" + "x" * 500 + "@0.01"
    for one, other in pairwise(label(name, longest) for longest in (5, 12, LONGEST_LABEL)):
        assert len(one) < len(other)
    assert label(name).startswith("begin")
    assert label(name).endswith("@0.01")
    assert len(label(name)) == LONGEST_LABEL
