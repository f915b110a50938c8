"""What a mask selected, told in the terminal and drawn: its kept entries by layer and module type."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.masks.mask_files import HEAD, Inspected, read_mask, short_names
from fish_tuning.experiments.masks.overlaps import Overlap, overlap
from fish_tuning.experiments.records.kept import kept_shares
from fish_tuning.experiments.records.run_record import KeptShare, RunRecord
from fish_tuning.experiments.report.pictures.canvas import Picture, png
from fish_tuning.experiments.report.pictures.folder import kept_heat_maps
from fish_tuning.experiments.report.shares import factor_shares
from fish_tuning.experiments.report.tables import plain_table
from fish_tuning.files.atomic import DISK_FULL, write_atomically
from fish_tuning.masks.budgets import module_type

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LEGEND = (
    "By chance: of random masks of these sizes. Per tensor: of random masks that keep as many entries in each tensor "
    "as these do; only what lies above that is agreement on entries rather than on tensors."
)


def inspect_masks(console: Console, paths: Sequence[str], picture: str | None = None) -> None:
    """Print where each mask went and how far each pair agrees, and draw the picture when a file is named."""
    masks = [read_mask(path) for path in paths]
    pairs = {(a, b): overlap(masks[a], masks[b]) for a, b in combinations(range(len(masks)), 2)}
    drawn = _draw(masks, Path(picture)) if picture is not None else None
    for number, mask in enumerate(masks, 1):
        console.print(f"{number}: {mask.path}" if pairs else str(mask.path), soft_wrap=True)
        for part in describe(mask, console.width):
            console.print(part)
        console.print()
    if pairs:
        console.print("overlap of the kept entries")
        console.print(overlap_table(pairs))
        console.print(LEGEND)
        for (a, b), pair in pairs.items():
            if pair.left_out:
                console.print(f"note: {a + 1}, {b + 1}: {pair.left_out} tensors that only one has are left out.")
    if drawn is not None:
        console.print(f"written: {drawn}", soft_wrap=True)


def masks_as_json(paths: Sequence[str], picture: str | None = None) -> str:
    """The same as one JSON document, and the picture drawn when a file is named.

    `masks` holds of each mask its path, counts, and `kept` by layer and module type; `overlaps` of each pair their
    numbers (from 1), how many entries both keep, and how many that would be by chance and by chance per tensor.
    """
    masks = [read_mask(path) for path in paths]
    pairs = {(a, b): overlap(masks[a], masks[b]) for a, b in combinations(range(len(masks)), 2)}
    drawn = _draw(masks, Path(picture)) if picture is not None else None
    data = {
        "masks": [_mask_data(mask) for mask in masks],
        "overlaps": [
            {
                "masks": [a + 1, b + 1],
                "kept": list(pair.kept),
                "total": pair.total,
                "both": pair.both,
                "by_chance": pair.by_chance,
                "by_chance_per_tensor": pair.by_tensor,
                "tensors_left_out": pair.left_out,
            }
            for (a, b), pair in pairs.items()
        ],
        "files": [] if drawn is None else [str(drawn)],
    }
    return json.dumps(data, indent=2)


def _mask_data(mask: Inspected) -> dict[str, Any]:
    shares = kept_shares(mask.masked)
    kept, total = _sums(shares)
    return {
        "path": str(mask.path),
        "note": mask.note or None,
        "masked_tensors": len(mask.masked),
        "entries": total,
        "kept_entries": kept,
        "dense_tensors": len(mask.dense),
        "dense_entries": sum(mask.tensors[name].numel() for name in mask.dense),
        "kept": [asdict(share) for share in shares],
    }


def describe(mask: Inspected, width: int) -> list[str | Table]:
    """Counts, tables and sentences on one mask for a terminal of `width` columns."""
    shares = kept_shares(mask.masked)
    parts: list[str | Table] = [_counts(mask, shares), _dense_line(mask)]
    if mask.note:
        parts.append(mask.note)
    if not shares:
        return parts
    parts += ["", _totals(shares), "", "share of entries kept by layer, %"]
    for table in layer_tables(shares, width):
        parts += [table, ""]
    return parts + [line for line in (_factors(shares), _extremes(shares)) if line]


def _counts(mask: Inspected, shares: Sequence[KeptShare]) -> str:
    if not shares:
        return "masked tensors: none"
    kept, total = _sums(shares)
    whole = sum(bool(tensor.all()) for tensor in mask.masked.values())
    untouched = sum(not tensor.any() for tensor in mask.masked.values())
    return (
        f"masked tensors: {len(mask.masked):,} with {total:,} entries, {kept:,} kept ({kept / max(total, 1):.1%}); "
        f"{whole} kept whole, {untouched} not at all"
    )


def _dense_line(mask: Inspected) -> str:
    sizes: Counter[str] = Counter()
    for name in sorted(mask.dense):
        before, head, _ = name.partition(HEAD)
        sizes[f"head {before.rsplit('.', 1)[-1]}" if head else module_type(name)] += mask.tensors[name].numel()
    listed = ", ".join(f"{kind} {size:,}" for kind, size in sizes.items())
    return (
        f"dense tensors: {len(mask.dense):,} with {sizes.total():,} entries ({listed})"
        if sizes
        else "dense tensors: none"
    )


def _totals(shares: Sequence[KeptShare]) -> Table:
    everything, _ = _sums(shares)
    rows = []
    for module in sorted({share.module for share in shares}):
        kept, total = _sums(share for share in shares if share.module == module)
        rows.append([module, f"{total:,}", f"{kept:,}", f"{percent(kept, total)}%", f"{percent(kept, everything)}%"])
    return plain_table(["module type", "entries", "kept", "share kept", "of total"], rows)


def layer_tables(shares: Sequence[KeptShare], width: int) -> list[Table]:
    """Layers down and module types across, or the other way round in blocks of layers where that is too wide."""
    cells = {(share.layer, share.module): percent(share.kept, share.total) for share in shares}
    layers, modules = list(dict.fromkeys(layer for layer, _ in cells)), sorted({module for _, module in cells})
    rows = [[_layer(layer), *(cells.get((layer, module), "") for module in modules)] for layer in layers]
    upright = plain_table(["layer", *(module.replace(".", " ") for module in modules)], rows)
    if sum(column.width or 0 for column in upright.columns) + 2 * len(modules) <= width:  # two between columns
        return [upright]
    room = max(1, (width - max(map(len, modules))) // (2 + max(map(len, cells.values()))))
    size = ceil(len(layers) / ceil(len(layers) / room))
    blocks = [layers[start : start + size] for start in range(0, len(layers), size)]
    return [
        plain_table(
            ["layer", *map(_layer, block)],
            [[module, *(cells.get((layer, module), "") for layer in block)] for module in modules],
        )
        for block in blocks
    ]


def _factors(shares: Sequence[KeptShare]) -> str:
    parts = factor_shares(shares)
    if not {"A", "B"} <= parts.keys():
        return ""
    (a, all_a), (b, all_b) = parts["A"], parts["B"]
    ratio = f", {a / b:.2f} of A for each of B" if b else ""
    return f"LoRA: kept {a:,} of A ({percent(a, all_a)}%) and {b:,} of B ({percent(b, all_b)}%){ratio}."


def _extremes(shares: Sequence[KeptShare]) -> str:
    sums = {layer: _sums(s for s in shares if s.layer == layer) for layer in dict.fromkeys(s.layer for s in shares)}
    parts = {layer: kept / total for layer, (kept, total) in sums.items() if layer is not None and total}
    if len(parts) < 2:
        return ""
    most, least = max(parts, key=parts.__getitem__), min(parts, key=parts.__getitem__)
    if parts[most] == parts[least]:
        return f"Every layer keeps the same share of its entries, {percent(*sums[most])}%."
    return (
        f"Layer {most} keeps the largest share of its entries, {percent(*sums[most])}%, "
        f"layer {least} the smallest, {percent(*sums[least])}%."
    )


def _layer(layer: int | None) -> str:
    return "-" if layer is None else str(layer)


def _sums(shares: Iterable[KeptShare]) -> tuple[int, int]:
    counted = [(share.kept, share.total) for share in shares]
    return sum(kept for kept, _ in counted), sum(total for _, total in counted)


def kept_picture(masks: Sequence[Inspected]) -> Picture:
    """A heat map of layers and module types for each mask, in a report's look and on one colour scale."""
    labels = short_names([mask.path for mask in masks])
    runs = [
        RunRecord(label, 0, "ok", "", kept=kept_shares(mask.masked)) for label, mask in zip(labels, masks, strict=True)
    ]
    picture = kept_heat_maps(labels, runs)
    if picture is None:
        raise ConfigurationError("--picture: no tensor is masked, so there is nothing to draw.")
    return picture


def _draw(masks: Sequence[Inspected], file: Path) -> Path:
    if file.suffix.lower() != ".png":
        raise ConfigurationError(f"--picture {file}: the picture is a PNG, so its name must end in .png.")
    content = png(kept_picture(masks))
    try:
        return write_atomically(file, content)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise ConfigurationError(f"--picture: cannot write {file}: {error.strerror}") from error


def overlap_table(pairs: Mapping[tuple[int, int], Overlap]) -> Table:
    headers = [
        "masks",
        "kept by both",
        "of the smaller",
        "by chance",
        "by chance per tensor",
        "Jaccard",
        "by chance",
    ]
    rows = [
        [
            f"{a + 1}, {b + 1}",
            f"{pair.both:,}",
            *(f"{percent(common, min(pair.kept))}%" for common in (pair.both, pair.by_chance, pair.by_tensor)),
            *(f"{common / (sum(pair.kept) - common):.3f}" for common in (pair.both, pair.by_chance)),
        ]
        for (a, b), pair in pairs.items()
    ]
    return plain_table(headers, rows)


def percent(part: float, whole: float) -> str:
    """`12.3`; `0` and `100` are exact, `<0.1` is little but not nothing."""
    if part in (0, whole):
        return "0" if part == 0 else "100"
    value = 100 * part / whole
    return "<0.1" if value < 0.05 else f"{value:.1f}"
