"""Numbers as they are told, everywhere alike: what rounds to nothing has no sign."""

from __future__ import annotations

MINUS = "\N{MINUS SIGN}"


def number(value: float, digits: int = 3) -> str:
    """`0.812`, `-0.031`, and `0.000` for what rounds to nothing."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def signed(value: float, digits: int = 3) -> str:
    """`+0.012`, `-0.031`, and `0.000` for what rounds to nothing."""
    rounded = round(value, digits) + 0.0
    return f"{rounded:+.{digits}f}" if rounded else f"{rounded:.{digits}f}"


def bound(value: float) -> str:
    """One end of an interval, with as many digits as tell on which side of zero it is."""
    digits = 3
    while value and not round(value, digits) and digits < 9:
        digits += 1
    return signed(value, digits)


def typeset(text: str) -> str:
    """The same with a true minus, for pages."""
    return text.replace("-", MINUS)
