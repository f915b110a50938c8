"""Small parts of SVG pictures: elements, scales and axes. Colours are CSS variables, which the page sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

Scale = Callable[[float], float]


def element(name: str, *children: str, **attributes: object) -> Markup:
    """`<name attribute="value">children</name>`, escaped; `class_` is `class`, `stroke_width` is `stroke-width`."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{Markup('').join(children)}</{name}>")


def picture(width: float, height: float, title: str, description: str, *children: str, class_: str = "") -> Markup:
    """A picture with a title and a description for who cannot see it, at most as wide as it is drawn."""
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        *children,
        viewBox=f"0 0 {_short(width)} {_short(height)}",
        width=width,
        height=height,
        role="img",
        aria_label=f"{title}. {description}",
        class_=class_ or None,
    )


def text(x: float, y: float, words: str, anchor: str = "start", class_: str | None = None, **more: object) -> Markup:
    return element("text", words, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_, **more)


def line(x1: float, y1: float, x2: float, y2: float, class_: str | None = None, **more: object) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_, **more)


def linear(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    even = linear(math.log10(low), math.log10(high), start, end)
    return lambda value: even(math.log10(value))


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """From the smallest to the largest with some air; never empty."""
    low, high = min(values), max(values)
    air = share * (high - low) or abs(high) * share or share
    return low - air, high + air


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values between the two: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) + 0.0 for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten, with 2 and 5 times them where there is room."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1,)):
        found = [value for power in powers for factor in factors if low <= (value := factor * 10.0**power) <= high]
        if len(found) <= most:
            break
    return found


def tick_text(value: float) -> str:
    """`0.05`, `12k`, `3.5M`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}".replace("-", "\N{MINUS SIGN}")
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def _short(value: object) -> str:
    """Tenths of a pixel are enough."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
