"""Heat maps of where kept entries lie: a row for each module, a column for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, nan
from typing import TYPE_CHECKING

from fish_tuning.experiments.report.look import PALETTE, label
from fish_tuning.experiments.report.pictures.canvas import (
    FONT,
    SMALL,
    Margins,
    Picture,
    add_axes,
    empty_figure,
    fitted,
    size_of,
    style,
    write,
)
from fish_tuning.experiments.report.shares import Shares, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL, _ROW = 34.0, 24.0
_LAYERS, _NAME = 24.0, 26.0  # height of the layers' numbers, and of a map's name
_EDGE, _GAP, _FRAME = 2.0, 30.0, 12.0  # _FRAME: around a picture that stands alone
_WIDEST = 1100.0  # of maps side by side
_SCALE = 76.0  # width of the colour scale with its words
_COLOURS = "cividis"  # even steps for the eye, whatever colours it tells apart
# A page leaves the colours of cells as they are, and so it must the ink on them: none of the palette's.
_ON_LIGHT, _ON_DARK = "#010101", "#fefefe"


def heat_picture(maps: Mapping[str, Shares], top: float, *, titles: bool = True) -> Picture:
    """A map for each arm, side by side as far as there is room, on one scale of colours that ends with the share `top`.

    Without `titles` there are no names and no scale either: a page writes both itself.
    """
    sizes = [_size(shares) for shares in maps.values()]
    width = max([size[0] for size in sizes] + [fitted(arm)[1] for arm in maps if titles])
    height = max(size[1] for size in sizes) + titles * _NAME
    across = max(1, min(len(maps), int((_WIDEST + _GAP) // (width + _GAP))))
    down, frame = ceil(len(maps) / across), titles * _FRAME
    whole_width = across * (width + _GAP) - _GAP + titles * _SCALE + 2 * frame
    whole_height = down * (height + _GAP) - _GAP + 2 * frame
    with style():
        figure = empty_figure(whole_width, whole_height)
        for number, (arm, shares) in enumerate(maps.items()):
            x, y = frame + (number % across) * (width + _GAP), frame + (number // across) * (height + _GAP)
            _map(figure, shares, top, x, y + titles * _NAME)
            if titles:
                figure.text(x / whole_width, 1 - (y + FONT) / whole_height, label(arm), color=PALETTE["ink"].light)
        if titles:
            left, above = whole_width - frame - _SCALE + 16, frame + _NAME + _LAYERS
            _scale(figure, top, left, above, min(whole_height - above - frame, 160.0))
        title = f"Share of entries that {', '.join(maps)} keep{'s' if len(maps) == 1 else ''}"
        return Picture(figure, "heat", title, "; ".join(map(_said, maps.values())))


def largest_share(maps: Mapping[str, Shares]) -> float:
    return max(share for shares in maps.values() for share in shares.values())


def scale_colours(steps: int = 21) -> list[str]:
    """The colours of the scale, from nothing to its end."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps[_COLOURS](step / (steps - 1))) for step in range(steps)]


def _axis(shares: Shares) -> tuple[list[int | None], list[str]]:
    layers = sorted({layer for layer, _ in shares}, key=lambda layer: -1 if layer is None else layer)
    return layers, sorted({module for _, module in shares})


def _left(modules: list[str]) -> float:
    return max(fitted(module)[1] for module in modules) + 14


def _size(shares: Shares) -> tuple[float, float]:
    layers, modules = _axis(shares)
    return _left(modules) + _CELL * len(layers) + _EDGE, _LAYERS + _ROW * len(modules) + _EDGE


def _map(figure: Figure, shares: Shares, top: float, x: float, y: float) -> None:
    """A map with its names, whose upper left corner is at x and y from that of the figure."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    layers, modules = _axis(shares)
    width, height = size_of(figure)
    left, above = x + _left(modules), y + _LAYERS
    right, below = width - left - _CELL * len(layers), height - above - _ROW * len(modules)
    ax = add_axes(figure, Margins(left, right, above, below))
    grid = [[shares.get((layer, module), nan) for layer in layers] for module in modules]
    colours, norm = colormaps[_COLOURS], Normalize(0, top or 1.0)
    ax.imshow(grid, colours, norm, aspect="auto", interpolation="none")
    for spine in ax.spines.values():
        spine.set_visible(False)
    for edge in range(1, len(layers)):
        ax.axvline(edge - 0.5, color=PALETTE["ground"].light, linewidth=1)
    for edge in range(1, len(modules)):
        ax.axhline(edge - 0.5, color=PALETTE["ground"].light, linewidth=1)
    ax.xaxis.tick_top()
    ax.set_xticks(
        range(len(layers)), ["\N{EN DASH}" if layer is None else str(layer) for layer in layers], va="baseline"
    )
    ax.set_yticks(range(len(modules)), [label(module) for module in modules])
    ax.tick_params(pad=7)
    write(ax, "layer", (0, 1), (-7, 7), "axes fraction", ha="right")
    for row, line in enumerate(grid):
        for column, share in enumerate(line):
            if share == share:  # a module that a layer lacks is NaN
                ink = _ON_LIGHT if _luminance(colours(norm(share))) > 0.18 else _ON_DARK
                ax.text(column, row, percent(share), ha="center", va="center_baseline", fontsize=SMALL, color=ink)


def _scale(figure: Figure, top: float, left: float, above: float, height: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    width, whole = size_of(figure)
    ax = add_axes(figure, Margins(left, width - left - 12, above, whole - above - height))
    ax.set_title("kept, %", fontsize=SMALL, color=PALETTE["muted"].light, loc="left")
    bar = figure.colorbar(ScalarMappable(Normalize(0, top or 1.0), _COLOURS), cax=ax)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")


def _said(shares: Shares) -> str:
    layers, modules = _axis(shares)
    (layer, module), most = max(shares.items(), key=lambda item: item[1])
    where = "outside the layers" if layer is None else f"layer {layer}"
    return f"{len(modules)} modules in {len(layers)} layers; most is kept of {module}, {where}: {percent(most)} %"


def _luminance(colour: tuple[float, ...]) -> float:
    """Of WCAG: black on it has at least 4.5 to 1 from about 0.18 on, white below."""
    red, green, blue = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour[:3])
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)
