"""Where the kept entries of an arm lie: modules by layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from markupsafe import Markup

from fish_tuning.experiments.records.run_record import RunRecord
from fish_tuning.experiments.report.page.svg import element, picture, text

Shares = dict[tuple[int | None, str], float]
_CELL, _ROW, _TOP = 34, 24, 30  # two maps of twelve layers stand side by side
_CHARACTER = 6.7
# Six of matplotlib's cividis, from nothing to all: even steps for the eye, whatever colours it tells apart.
_CIVIDIS = ((0, 34, 78), (53, 69, 108), (102, 105, 112), (148, 142, 119), (200, 184, 102), (254, 232, 56))


def mean_shares(runs: Sequence[RunRecord]) -> Shares:
    """Kept over total for each layer and module (a weight with its bias), as a mean over runs."""
    shares: dict[tuple[int | None, str], list[float]] = defaultdict(list)
    for run in runs:
        sums: dict[tuple[int | None, str], list[int]] = defaultdict(lambda: [0, 0])
        for share in run.kept:
            sums[share.layer, share.module][0] += share.kept
            sums[share.layer, share.module][1] += share.total
        for key, (kept, total) in sums.items():
            shares[key].append(kept / total if total else 0.0)
    return {key: fmean(values) for key, values in shares.items()}


def factor_shares(runs: Sequence[RunRecord]) -> dict[str, tuple[int, int]]:
    """Kept and all entries of the factors A and B of LoRA; empty where there are none."""
    sums: dict[str, tuple[int, int]] = {}
    for share in (share for run in runs for share in run.kept):
        if share.module.endswith(("_A", "_B")):
            kept, total = sums.get(share.module[-1], (0, 0))
            sums[share.module[-1]] = kept + share.kept, total + share.total
    return sums


def heat_map(shares: Mapping[tuple[int | None, str], float], title: str, top: float) -> Markup:
    """A row for each module, a column for each layer; `top` is the share that the scale ends with."""
    layers = sorted({layer for layer, _ in shares}, key=lambda layer: -1 if layer is None else layer)
    modules = sorted({module for _, module in shares})
    left = max(map(len, modules)) * _CHARACTER + 14
    cells = [
        _cell(
            left + _CELL * layers.index(layer),
            _TOP + _ROW * modules.index(module),
            share,
            top,
            f"{module}, {_name(layer)}",
        )
        for (layer, module), share in shares.items()
    ]
    most = max(shares, key=lambda key: shares[key])
    return picture(
        left + _CELL * len(layers) + 2,
        _TOP + _ROW * len(modules) + 2,
        title,
        f"{len(modules)} modules in {len(layers)} layers; most is kept of {most[1]}, {_name(most[0])}: "
        f"{percent(shares[most])} %",
        text(left - 8, 18, "layer", "end", "label"),
        *(
            text(left + _CELL * (number + 0.5), 18, "\N{EN DASH}" if layer is None else str(layer), "middle")
            for number, layer in enumerate(layers)
        ),
        *(text(left - 8, _TOP + _ROW * (number + 0.5) + 4, module, "end") for number, module in enumerate(modules)),
        *cells,
        class_="heat",
    )


def percent(share: float) -> str:
    """`0` only for nothing, `100` only for all of it."""
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f}"
    if value < 0.05:
        return "<0.1"
    return f"{value:.1f}" if value < 9.95 else ">99" if value >= 99.5 else f"{value:.0f}"


def colour(share: float) -> tuple[int, int, int]:
    """Of the scale, for a share from 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(_CIVIDIS) - 1)
    index = min(int(place), len(_CIVIDIS) - 2)
    low, high = _CIVIDIS[index], _CIVIDIS[index + 1]
    red, green, blue = (round(a + (b - a) * (place - index)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _name(layer: int | None) -> str:
    return "outside the layers" if layer is None else f"layer {layer}"


def _cell(x: float, y: float, share: float, top: float, where: str) -> Markup:
    red, green, blue = colour(share / top if top else 0.0)
    ink = "on-light" if _luminance(red, green, blue) > 0.18 else "on-dark"
    return element(
        "g",
        element("title", f"{where}: {percent(share)} % kept"),
        element("rect", x=x, y=y, width=_CELL - 1, height=_ROW - 1, fill=f"rgb({red},{green},{blue})"),
        text(x + _CELL / 2 - 0.5, y + _ROW / 2 + 3.5, percent(share), "middle", ink),
    )


def _luminance(*channels: int) -> float:
    """Of WCAG: black on it has at least 4.5 to 1 from about 0.18 on, white below."""
    red, green, blue = (
        value / 12.92 if (value := channel / 255) <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for channel in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
