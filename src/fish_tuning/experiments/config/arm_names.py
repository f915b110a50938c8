"""Names of arms: a PEFT method, how its entries are chosen, and how many, as in `lora-fish-rand@0.1`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from fish_tuning.masks.selections import SELECTIONS as REGISTERED
from fish_tuning.scores.named import SCORES


class Selection(NamedTuple):
    """How a masked arm chooses its entries; see `create_mask_from_fisher`."""

    name: str  # of the selection, as `method` of that function takes it
    quotas: bool = False
    normalize: bool = False
    score: str | None = None  # what entries are judged by, where the arm's name says it: `lora-gain`


SELECTIONS = {
    "fish": Selection("fish"),
    "fish-rand": Selection("rand"),
    "fish-rev": Selection("rev"),
    "fish-quota": Selection("fish", quotas=True),
    "fish-norm": Selection("fish", normalize=True),
}
_BUILT_IN = ("fish", "rand", "rev")
HEAD_ALONE = "head"  # an arm that trains the task's head and nothing of an adapter
CONTROLS = ("fish-rand", "fish-rev")  # the same budget of the same pool, chosen without or against the scores


def suffixes() -> list[str]:
    """All that may follow a method's name: the built-in ones, the selections that were registered, and the scores."""
    registered = [name for name in REGISTERED if name not in _BUILT_IN]
    return [*SELECTIONS, *registered, *(name for name in SCORES if name not in registered)]


@dataclass(frozen=True)
class ArmName:
    """An arm's name in its parts; empty where there is none.

    Args:
        method: of PEFT, such as `lora`, or what the file calls it.
        suffix: one of `suffixes()`, or empty for a dense arm, which trains all of its adapter.
        budget: a keep ratio (`0.1`: that share of the pool), `n4608` (that many entries), or `top2`: as many as in the
            top two layers.
    """

    method: str
    suffix: str = ""
    budget: str = ""

    @classmethod
    def parse(cls, text: str) -> ArmName:
        arm, _, budget = text.partition("@")
        method, _, suffix = arm.partition("-")
        return cls(method, suffix, budget)

    def __str__(self) -> str:
        return self.method + (f"-{self.suffix}" if self.suffix else "") + (f"@{self.budget}" if self.budget else "")

    @property
    def selection(self) -> Selection | None:
        """How its entries are chosen; None for a dense arm."""
        if self.suffix in SCORES and self.suffix not in REGISTERED:
            return Selection("fish", score=self.suffix)
        return SELECTIONS.get(self.suffix, Selection(self.suffix)) if self.suffix else None

    @property
    def top_layers(self) -> int | None:
        found = re.fullmatch(r"top([0-9]{1,4})", self.budget)
        return int(found[1]) if found else None

    @property
    def count(self) -> int | None:
        """How many entries it keeps, where that is its budget."""
        found = re.fullmatch(r"n([0-9]{1,18})", self.budget)
        return int(found[1]) if found else None

    @property
    def baseline(self) -> str:
        """The dense arm that this one is compared with: of the same method, and of the same layers if they are few."""
        return str(ArmName(self.method, budget=self.budget if self.top_layers else ""))


def needs_scores(arm: str) -> bool:
    """Whether an arm's entries are chosen by scores."""
    selection = ArmName.parse(arm).selection
    return selection is not None and REGISTERED.find(selection.name).needs_scores


def count_budget(entries: int) -> str:
    return f"n{entries}"


def ratio_budget(ratio: float) -> str:
    """As short as it can be and still be that number: arms are planned by their names."""
    short = f"{ratio:g}"
    return short if float(short) == ratio else repr(ratio)


def baseline_of(arm: str) -> str:
    """The dense arm of the same method: `dora` for `dora-fish`, `lora@top2` for `lora-fish@top2`."""
    return ArmName.parse(arm).baseline


class Variant(NamedTuple):
    """Which of a method's adapters: the smaller one of the baseline or the pool, in all layers or in the top ones."""

    small: bool = False
    top_layers: int | None = None
