"""The look of each arm. Nothing is told by colour alone: how entries are chosen is also a sign inside the mark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fish_tuning.experiments.config.arm_names import SELECTIONS, ArmName
from fish_tuning.experiments.report.page.svg import element

COLOURS = 7  # --c0 to --c6 of the style sheet: Okabe and Ito's
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 2 1 2 1 2", "12 4", "1 2")


@dataclass(frozen=True)
class Look:
    colour: int  # how the entries are chosen
    shape: int  # the method; with one method, how the entries are chosen
    sign: int = 0  # inside the shape, how the entries are chosen; none with one method

    @property
    def css(self) -> str:
        return f"c{self.colour}"

    @property
    def dash(self) -> str | None:
        return _DASHES[self.colour % len(_DASHES)] or None


def looks(arms: Sequence[str]) -> dict[str, Look]:
    """With one method, shape and colour say the same; arms that differ by their budget only look alike."""
    names = {arm: ArmName.parse(arm) for arm in arms}
    methods = list(dict.fromkeys(name.method for name in names.values()))
    chosen = ["", *SELECTIONS]
    order = chosen + [name.suffix for name in names.values() if name.suffix not in chosen]
    return {
        arm: Look(
            order.index(name.suffix) % COLOURS,
            methods.index(name.method) if len(methods) > 1 else order.index(name.suffix),
            order.index(name.suffix) % COLOURS if len(methods) > 1 else 0,
        )
        for arm, name in names.items()
    }


def mark(x: float, y: float, look: Look, size: float = 5.0) -> Markup:
    """A filled shape around a point (circle, square, diamond, triangles, plus, cross or star) with its sign."""
    css = f"mark {look.css}"
    if look.shape % 8 == 0:
        shape = element("circle", cx=x, cy=y, r=size, class_=css)
    else:
        points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in _OUTLINES[look.shape % 8 - 1])
        shape = element("polygon", points=points, class_=css)
    strokes = "".join(
        f"M{x + size * x1:.1f},{y + size * y1:.1f}L{x + size * x2:.1f},{y + size * y2:.1f}"
        for x1, y1, x2, y2 in _SIGNS[look.sign]
    )
    return shape + element("path", d=strokes, class_="sign") if strokes else shape


_SIGNS: list[list[tuple[float, float, float, float]]] = [
    [],
    [(-0.15, 0, 0.15, 0)],
    [(-0.55, 0, 0.55, 0)],
    [(0, -0.55, 0, 0.55)],
    [(-0.5, 0, 0.5, 0), (0, -0.5, 0, 0.5)],
    [(-0.4, -0.4, 0.4, 0.4), (-0.4, 0.4, 0.4, -0.4)],
    [(-0.4, 0.4, 0.4, -0.4)],
]
_PLUS = [
    *((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4)),
    *((0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)),
]
_OUTLINES: list[list[tuple[float, float]]] = [
    [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
    [(0, -1.2), (1.15, 0.9), (-1.15, 0.9)],
    [(0, 1.2), (1.15, -0.9), (-1.15, -0.9)],
    _PLUS,
    [((dx - dy) * 0.74, (dx + dy) * 0.74) for dx, dy in _PLUS],
    [
        *((0, -1.4), (0.33, -0.45), (1.33, -0.43), (0.53, 0.17), (0.82, 1.13)),
        *((0, 0.56), (-0.82, 1.13), (-0.53, 0.17), (-1.33, -0.43), (-0.33, -0.45)),
    ],
]
