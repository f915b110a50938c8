"""Draw the pictures of the documentation: `python scripts/draw_docs_pictures.py` writes docs/pictures/*.svg.

Each has a ground of its own and follows the reader's light or dark setting, so it is legible on any page.
"""

from __future__ import annotations

import random
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
CELL, GAP = 16, 3
ROWS, COLUMNS = 6, 8
KEPT = 12

_LIGHT = {"ground": "#f8f8f6", "ink": "#24292f", "muted": "#6a737d", "cell": "#d5dade", "kept": "#c2410c"}
_DARK = {"ground": "#1b1f24", "ink": "#e6e6e1", "muted": "#9aa4ae", "cell": "#39424b", "kept": "#fb923c"}


def _style() -> str:
    def rules(colours: dict[str, str]) -> str:
        return "".join(
            [f".{name}{{fill:{colour}}}" for name, colour in colours.items()]
            + [f".line{{stroke:{colours['muted']};stroke-width:1.5;fill:none}}"]
        )

    return f"<style>{rules(_LIGHT)}@media(prefers-color-scheme:dark){{{rules(_DARK)}}}</style>"


def _svg(width: int, height: int, title: str, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" font-family="system-ui,sans-serif" font-size="13">'
        f"<title>{escape(title)}</title>{_style()}"
        f'<rect class="ground" width="{width}" height="{height}" rx="8"/>' + "".join(parts) + "</svg>\n"
    )


def _text(x: float, y: float, text: str, look: str = "ink", anchor: str = "middle", size: int = 13) -> str:
    return f'<text class="{look}" x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _cell(x: float, y: float, look: str, opacity: float = 1.0) -> str:
    shown = "" if opacity == 1 else f' opacity="{opacity:.2f}"'
    return f'<rect class="{look}" x="{x:g}" y="{y:g}" width="{CELL}" height="{CELL}" rx="2"{shown}/>'


def _arrow(x: float, y: float, length: float, text: str = "") -> str:
    end = x + length
    head = f'<path class="line" d="M{x:g} {y:g}H{end:g}M{end - 6:g} {y - 5:g}L{end:g} {y:g}L{end - 6:g} {y + 5:g}"/>'
    return head + (_text(x + length / 2, y - 10, text, "muted", size=11) if text else "")


def _scores() -> list[float]:
    chooser = random.Random(7)
    return [chooser.random() ** 3 for _ in range(ROWS * COLUMNS)]


def _kept(scores: list[float]) -> set[int]:
    return set(sorted(range(len(scores)), key=scores.__getitem__)[-KEPT:])


def _grid(x: float, y: float, looks: list[tuple[str, float]]) -> list[str]:
    step = CELL + GAP
    return [_cell(x + step * (at % COLUMNS), y + step * (at // COLUMNS), *look) for at, look in enumerate(looks)]


def pipeline() -> str:
    """Pool, scores, mask, sparse training."""
    scores = _scores()
    kept, width, top = _kept(scores), COLUMNS * (CELL + GAP) - GAP, 46
    columns = {
        "pool": [("cell", 1.0)] * len(scores),
        "scores": [("kept", 0.12 + 0.88 * score / max(scores)) for score in scores],
        "mask": [("kept" if at in kept else "cell", 1.0) for at in range(len(scores))],
    }
    told = {"pool": "entries of the adapter", "scores": "one for each entry", "mask": f"exactly {KEPT} entries"}
    steps = ("calibration", "budget", "apply_mask")
    parts, x = [], 24.0
    middle = top + (ROWS * (CELL + GAP)) / 2
    for (name, looks), step in zip(columns.items(), steps, strict=True):
        parts += [_text(x + width / 2, 26, name, size=15), *_grid(x, top, looks)]
        parts += [_text(x + width / 2, top + ROWS * (CELL + GAP) + 20, told[name], "muted", size=12)]
        parts += [_arrow(x + width + 10, middle, 70, step)]
        x += width + 90
    parts += [_text(x + width / 2, 26, "sparse training", size=15)]
    parts += _grid(x, top, [("cell", 0.45)] * len(scores))
    parts += [_text(x + width / 2, top + ROWS * (CELL + GAP) + 20, "frozen, bit for bit", "muted", size=12)]
    below = top + ROWS * (CELL + GAP) + 34
    parts += [_cell(x + (at % 6) * (CELL + GAP) + 19, below + (at // 6) * (CELL + GAP), "kept") for at in range(KEPT)]
    parts += [_text(x + width / 2, below + 56, f"{KEPT} trained values", "muted", size=12)]
    parts += [_text(24, below + 20, "The arrows are functions; nothing but the last one", "muted", "start", 12)]
    parts += [_text(24, below + 38, "changes the model, and remove_mask undoes it.", "muted", "start", 12)]
    return _svg(int(x + width + 24), int(below + 72), "Pool, scores, mask and sparse training", parts)


def masked_tensor() -> str:
    """What a masked tensor is made of, and who sees which part."""
    kept, width, top = _kept(_scores()), COLUMNS * (CELL + GAP) - GAP, 46
    whole = [("kept" if at in kept else "cell", 1.0) for at in range(ROWS * COLUMNS)]
    frozen = [("cell", 0.25 if at in kept else 1.0) for at in range(ROWS * COLUMNS)]
    middle, right = top + (ROWS * (CELL + GAP)) / 2, 330.0
    parts = [_text(24 + width / 2, 26, "who reads the name", size=15), *_grid(24, top, whole)]
    under = top + ROWS * (CELL + GAP) + 20
    parts += [_text(24 + width / 2, under, "the whole tensor: forward pass,", "muted", size=12)]
    parts += [_text(24 + width / 2, under + 16, "state_dict, save_pretrained", "muted", size=12)]
    parts += [_text(258, middle + 5, "=", size=24)]
    parts += [_text(right + width / 2, 26, "a frozen tensor", size=15), *_grid(right, top, frozen)]
    parts += [_text(right + width / 2, under, "no gradient is kept,", "muted", size=12)]
    parts += [_text(right + width / 2, under + 16, "no optimizer state", "muted", size=12)]
    parts += [_text(right + width + 34, middle + 5, "+", size=24)]
    values = right + width + 70
    parts += [_text(values + 55, 26, "k values", size=15)]
    parts += [
        _cell(values + (at % 6) * (CELL + GAP), middle - 20 + (at // 6) * (CELL + GAP), "kept") for at in range(12)
    ]
    parts += [_text(values + 55, under, "the parameter: optimizer,", "muted", size=12)]
    parts += [_text(values + 55, under + 16, "clipping, DDP, counts", "muted", size=12)]
    return _svg(int(values + 150), int(under + 36), "A masked tensor: a frozen tensor and its trained values", parts)


PICTURES = {"pipeline": pipeline, "masked-tensor": masked_tensor}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
        print(f"docs/pictures/{name}.svg")


if __name__ == "__main__":
    main()
