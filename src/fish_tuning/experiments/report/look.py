"""How arms look, everywhere: colour, mark, dashes and label. Nothing is told by colour alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fish_tuning.experiments.config.arm_names import HEAD_ALONE, ArmName


class Colour(NamedTuple):
    """On white and on dark ground."""

    light: str
    dark: str


# Arms have Okabe and Ito's colours, which colour-blind readers tell apart; the palest are darkened to 3 : 1 on white.
# Each light value is there once: a drawn picture's colours are recognised by it.
PALETTE = {
    "ground": Colour("#ffffff", "#14161a"),
    "band": Colour("#eef0f3", "#22262d"),
    "grid": Colour("#e6e8ec", "#2a2f37"),
    "muted": Colour("#565d68", "#a3abb8"),
    "ink": Colour("#1b1e23", "#e6e8ec"),
    "dense": Colour("#101215", "#f2f3f5"),
    "fish": Colour("#0072b2", "#3f9ee0"),
    "fish-rand": Colour("#d55e00", "#f07c2a"),
    "fish-rev": Colour("#cc79a7", "#dc9fc2"),
    "fish-quota": Colour("#009e73", "#25bd90"),
    "fish-norm": Colour("#c58500", "#f0b23c"),
    "head": Colour("#7b818b", "#9aa2ae"),
    "other": Colour("#2f93cc", "#93d3f7"),
}


class _Marks(NamedTuple):
    """Of a selection. The sign is for inside the mark of a method, where several are compared."""

    mark: str
    sign: str
    dashes: tuple[float, ...]


# Marks are matplotlib's: https://matplotlib.org/stable/api/markers_api.html
_MARKS = {
    "dense": _Marks("o", "", ()),
    "fish": _Marks("s", "_", (7, 3)),
    "fish-rand": _Marks("D", "|", (2, 3)),
    "fish-rev": _Marks("^", "+", (9, 3, 2, 3)),
    "fish-quota": _Marks("v", "x", (5, 2, 1, 2, 1, 2)),
    "fish-norm": _Marks("P", "1", (12, 4)),
}
_OTHERS = (  # selections that a user registered, in the order in which they come
    _Marks("*", "2", (4, 2)),
    _Marks("p", "3", (4, 2, 1, 2)),
    _Marks("h", "4", (6, 2, 2, 2)),
    _Marks("<", ".", (3, 1)),
    _Marks(">", ",", (8, 2, 1, 2)),
)
_HEAD = _Marks("X", "", (1, 2))
_METHODS = ("o", "s", "D", "^", "v", "P", "*", "p", "h", "<", ">")  # never the head's
LONGEST_LABEL = 40


@dataclass(frozen=True)
class Look:
    """Arms that only differ by their budget share one."""

    colour: str  # of PALETTE
    mark: str
    sign: str = ""  # another mark, inside the first
    dashes: tuple[float, ...] = ()

    @property
    def hex(self) -> str:
        return PALETTE[self.colour].light


def looks(arms: Sequence[str]) -> dict[str, Look]:
    """With one method, mark and colour both tell the selection; with several, the mark tells the method."""
    names = {arm: ArmName.parse(arm) for arm in arms if arm != HEAD_ALONE}
    methods = list(dict.fromkeys(name.method for name in names.values()))
    others = list(dict.fromkeys(name.suffix for name in names.values() if name.suffix and name.suffix not in _MARKS))
    found = {arm: _look(name, methods, others) for arm, name in names.items()}
    return {arm: found.get(arm) or Look("head", _HEAD.mark, dashes=_HEAD.dashes) for arm in arms}


def _look(name: ArmName, methods: Sequence[str], others: Sequence[str]) -> Look:
    known = (name.suffix or "dense") in _MARKS
    marks = _MARKS[name.suffix or "dense"] if known else _OTHERS[others.index(name.suffix) % len(_OTHERS)]
    colour = (name.suffix or "dense") if known else "other"
    if len(methods) == 1:
        return Look(colour, marks.mark, "", marks.dashes)
    return Look(colour, _METHODS[methods.index(name.method) % len(_METHODS)], marks.sign, marks.dashes)


def label(name: str, longest: int = LONGEST_LABEL) -> str:
    """A name as pictures show it: on one line, without control characters, the middle of a long one left out."""
    text = plain(name)
    if len(text) <= longest:
        return text
    tail = (longest - 1) // 2
    return f"{text[: longest - 1 - tail]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - tail :]}"


def plain(text: str) -> str:
    """One line of what can be printed; SVG must not even escape the other characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))


def style_sheet() -> str:
    """The palette as CSS variables, `--fish` and so on: light, dark, and light again in print."""
    light, dark = (
        " ".join(f"--{name}: {getattr(colour, ground)};" for name, colour in PALETTE.items())
        for ground in ("light", "dark")
    )
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
