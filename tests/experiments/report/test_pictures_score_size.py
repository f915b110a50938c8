"""The picture of score and size: every size in its place, in order, and nothing hidden."""

from __future__ import annotations

from itertools import pairwise

import fuzz
import pytest
from fakes import ok
from hypothesis import given
from hypothesis import strategies as st

from fish_tuning.experiments.report.look import looks
from fish_tuning.experiments.report.pictures.canvas import Picture
from fish_tuning.experiments.report.pictures.columns import arrange
from fish_tuning.experiments.report.pictures.score_size import Point, score_size_picture
from fish_tuning.experiments.report.pictures.sizes import arm_sizes

WIDTH = 600.0


def drawn(*points: tuple[str, int, float], width: float = 700, half: float | None = 0.01) -> Picture:
    each = [
        Point(arm, size, mean, *((None, None) if half is None else (mean - half, mean + half)))
        for arm, size, mean in points
    ]
    return score_size_picture(each, looks([point.arm for point in each]), "title", "kept entries", width, 300)


def marks(picture: Picture) -> dict[str, tuple[float, float]]:
    """Where the marks are, by what is told of them."""
    axes = picture.figure.axes[0]
    lines = [line for line in axes.lines if str(line.get_gid()).startswith("mark-")]
    return {
        picture.told[str(line.get_gid())].split(":")[0]: (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in lines
    }


@fuzz.settings()
@given(
    st.dictionaries(st.integers(0, 10**10), st.integers(1, 12), min_size=1, max_size=12),
    st.sampled_from([266.0, 400.0, 636.0]),
)
def test_columns_are_in_order_apart_and_inside(members: dict[int, int], width: float) -> None:
    columns, step = arrange(members, width)[:2]
    assert [column.size for column in columns] == sorted(members)
    assert step > 0
    for one, other in pairwise(columns):
        assert one.place < other.place
        assert one.middle + one.width / 2 <= other.middle - other.width / 2 + 1e-6
    assert columns[0].middle - columns[0].width / 2 >= -1e-6
    assert columns[-1].middle + columns[-1].width / 2 <= width + 1e-6
    for column in columns:
        assert step * members[column.size] <= column.width + 1e-6
        assert 0 <= column.place <= width


def test_where_there_is_room_a_column_stands_at_its_size() -> None:
    columns = arrange({100: 2, 10_000: 3, 1_000_000: 1}, WIDTH).columns
    assert [column.middle for column in columns] == pytest.approx([column.place for column in columns])


def test_columns_that_collide_move_no_further_than_they_must() -> None:
    near, first, second, far = arrange({100: 1, 10_000: 3, 10_100: 3, 1_000_000: 1}, WIDTH).columns
    assert first.middle < first.place < second.place < second.middle
    assert first.place - first.middle == pytest.approx(second.middle - second.place)
    assert (near.middle, far.middle) == pytest.approx((near.place, far.place))


def test_equal_sizes_share_a_column_and_the_larger_never_stands_on_the_left() -> None:
    at = marks(
        drawn(("lora@top2", 153_218, 0.5), ("lora-fish@0.1", 170_728, 0.5), ("lora-fish-rand@0.1", 170_728, 0.5))
    )
    assert at["lora@top2"][0] < at["lora-fish@0.1"][0] < at["lora-fish-rand@0.1"][0]
    assert at["lora-fish-rand@0.1"][0] - at["lora-fish@0.1"][0] == pytest.approx(14)  # side by side, none hidden


def test_a_column_points_to_its_size_on_the_axis() -> None:
    picture = drawn(("head", 0, 0.4), ("lora-fish", 2_212, 0.5), ("lora@top1", 2_304, 0.5), ("lora", 221_184, 0.6))
    above, nothing, axis = picture.figure.axes
    points = [above.transData.transform((patch.get_xy()[3][0], 0))[0] for patch in above.patches]
    expected = [nothing.transData.transform((0.5, 0))[0]]
    expected += [axis.transData.transform((size, 0))[0] for size in (2_212, 2_304, 221_184)]
    assert points == pytest.approx(expected)
    assert axis.get_xscale() == "log"
    assert [label.get_text() for label in nothing.get_xticklabels()] == ["0"]
    assert nothing.get_window_extent().x1 < axis.get_window_extent().x0  # the axis is broken between them


def test_the_head_alone_needs_no_logarithm() -> None:
    picture = drawn(("head", 0, 0.4))
    assert [axes.get_xscale() for axes in picture.figure.axes] == ["linear", "linear"]
    assert "kept entries" in [text.get_text() for text in picture.figure.axes[0].texts]


def test_what_is_drawn_is_what_the_caption_says() -> None:
    assert drawn(("lora", 10, 0.5), ("lora-fish", 5, 0.5)).intervals == "with 95 % intervals"
    without = drawn(("lora", 10, 0.5), half=None)
    assert without.intervals == "without intervals"
    assert not [line for line in without.figure.axes[0].lines if str(line.get_gid()).startswith("interval")]
    # An interval of no width would claim to be sure.
    assert drawn(("lora", 10, 0.5), half=0.0).intervals == "without intervals"


def test_budgets_of_an_arm_are_joined_in_their_order() -> None:
    picture = drawn(("lora-fish@0.1", 100, 0.6), ("lora-fish@0.01", 10, 0.5), ("lora", 1000, 0.7))
    lines = picture.figure.axes[0].lines
    (link,) = [line for line in lines if len(line.get_xdata()) == 2 and line.get_gid() is None]
    assert list(link.get_ydata()) == [0.5, 0.6]


def test_sizes_are_kept_entries_where_every_record_has_them() -> None:
    new = [
        ok("lora", 1, 0.5, kept_parameters=90, trainable_parameters=100),
        ok("lora", 2, 0.5, kept_parameters=95, trainable_parameters=105),
        ok("head", 1, 0.5, kept_parameters=0, trainable_parameters=10),
    ]
    assert arm_sizes(new) == ({"lora": 95, "head": 0}, "kept")
    old = ok("lora-fish", 1, 0.5, trainable_parameters=60)
    assert arm_sizes([*new, old]) == ({"lora": 105, "head": 10, "lora-fish": 60}, "trainable")
    assert arm_sizes([ok("lora", 1, 0.5, trainable_parameters=None)])[0] == {}
