"""What all pictures share: their style, axes measured in pixels, and saving as PNG.

matplotlib is imported when something is drawn. A unit is a pixel of the page, and a point in a PNG.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from fish_tuning.experiments.report.look import LONGEST_LABEL, PALETTE, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

FONT, SMALL = 12.0, 10.0
_PER_INCH = 72
_PNG_DPI = 150
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib; a page's text takes the page's font
    "font.size": FONT,
    "text.parse_math": False,  # a `$` in a name is a `$`
    "text.color": PALETTE["muted"].light,
    "axes.edgecolor": PALETTE["muted"].light,
    "axes.facecolor": PALETTE["ground"].light,
    "axes.labelcolor": PALETTE["muted"].light,
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": PALETTE["ground"].light,
    "grid.color": PALETTE["grid"].light,
    "hatch.linewidth": 1.5,
    "xtick.color": PALETTE["muted"].light,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.color": PALETTE["muted"].light,
    "ytick.major.size": 0,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fish-tuning",  # the same picture is the same file
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure, and what it says in words.

    Args:
        kind: the class of its SVG.
        told: for parts of it, by their gid, what a reader is told who points at them. A gid is a word, which becomes
            the part's class, and a number.
        intervals: what is drawn around its means; see `interval_words`.
    """

    figure: Figure
    kind: str
    title: str
    description: str
    told: dict[str, str] = field(default_factory=dict)
    intervals: str = ""


class Margins(NamedTuple):
    left: float
    right: float
    top: float
    bottom: float


@contextmanager
def style() -> Iterator[None]:
    """Draw and save in here: whatever a user's matplotlibrc says, pictures look alike."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; the tables have it.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def empty_figure(width: float, height: float) -> Figure:
    """One of its own, which no display and no global state knows of."""
    from matplotlib.figure import Figure

    return Figure((width / _PER_INCH, height / _PER_INCH))


def figure_and_axes(width: float, height: float, margins: Margins) -> tuple[Figure, Axes]:
    figure = empty_figure(width, height)
    return figure, add_axes(figure, margins)


def add_axes(figure: Figure, margins: Margins) -> Axes:
    width, height = size_of(figure)
    left, right, top, bottom = margins
    return figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )


def size_of(figure: Figure) -> tuple[float, float]:
    """Width and height."""
    width, height = figure.get_size_inches()
    return _PER_INCH * float(width), _PER_INCH * float(height)


def fitted(name: str, room: float = math.inf) -> tuple[str, float]:
    """A name, shortened to the room that there is for it, and its width."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    for longest in (LONGEST_LABEL, *range(LONGEST_LABEL - 4, 3, -4)):
        text = label(name, longest)
        width = text_to_path.get_text_width_height_descent(text, FontProperties(size=FONT), False)[0]
        if width <= room:
            break
    return text, width


def png(picture: Picture) -> bytes:
    content = io.BytesIO()
    with style():
        picture.figure.savefig(content, format="png", dpi=_PNG_DPI)
    return content.getvalue()


def padded(values: Iterable[float], share: float = 0.08) -> tuple[float, float]:
    """From the smallest to the largest with some air; never empty."""
    known = list(values)
    low, high = min(known), max(known)
    air = share * (high - low) or abs(high) * share or share
    return low - air, high + air


def tick_text(value: float, _: object = None) -> str:
    """`0.05`, `12k`, `3.5M`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}".replace("-", "\N{MINUS SIGN}")
    return f"{round(value, 12) + 0.0:g}".replace("-", "\N{MINUS SIGN}")


def write(
    ax: Axes,
    text: str,
    at: tuple[float, float],
    moved: tuple[float, float],
    coordinates: str | Transform = "data",
    **looks: Any,
) -> None:
    """Text at a place in the axes' data, in their fraction ("axes fraction") or a mixture; then moved by pixels."""
    ax.annotate(text, at, moved, xycoords=coordinates, textcoords="offset points", **looks)


def number(value: float) -> str:
    """With three digits; what rounds to nothing has no minus."""
    return f"{round(value, 3) + 0.0:.3f}".replace("-", "\N{MINUS SIGN}")


def value_axis(ax: Axes, which: str, most: int) -> None:
    """Round ticks, each with a line across."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(tick_text))
    axis.grid(True, linewidth=1)


def has_interval(low: float | None, high: float | None) -> bool:
    """Whether there is one to draw: one of no width would claim to be sure."""
    return low is not None and high is not None and high - low > 1e-9


def interval_words(intervals: Iterable[bool]) -> str:
    """Of a caption, after "means": what is drawn around them."""
    there = set(intervals)
    if True not in there:
        return "without intervals"
    return "with 95 % intervals" if False not in there else "with 95 % intervals where there are any"
