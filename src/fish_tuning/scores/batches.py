"""Calibration batches: to the device, cut to size, split into examples, and trimmed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fish_tuning.errors import FisherError
from fish_tuning.scores.losses import IGNORED, LABELS
from fish_tuning.scores.reading import placed

Batch = dict[str, Tensor]
Padding = tuple[bool, bool, bool]  # whether a row of a text is padded before its tokens, among them, and after them

# Entries that run along the tokens of a text; only these are cut when padding is trimmed.
SEQUENCE_KEYS = (
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "special_tokens_mask",
)  # fmt: skip
# What decides how a batch is scored, and so is looked at on the host.
LOOKED_AT = ("attention_mask", "input_ids", *LABELS)
FEW, LONG = 4, 512  # rows and tokens


class PlacedBatch(Batch):
    """A batch on its device, with copies on the CPU of what is looked at: a look at a GPU's tensor waits for it."""

    def __init__(self, tensors: Mapping[str, Tensor], on_cpu: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.on_cpu = dict(on_cpu)


def on_cpu(batch: Mapping[str, Tensor], key: str) -> Tensor | None:
    """A tensor of the batch on the CPU; copied at most once, and not at all where the loader gave it there."""
    value = batch.get(key)
    if value is None or value.device.type == "cpu":
        return value
    if not isinstance(batch, PlacedBatch):
        return value.cpu()
    if key not in batch.on_cpu:
        batch.on_cpu[key] = value.cpu()
    return batch.on_cpu[key]


def changed(batch: Mapping[str, Tensor], change: Callable[[str, Tensor], Tensor]) -> Batch:
    """Another batch, of `change(key, tensor)`."""
    tensors = {key: change(key, value) for key, value in batch.items()}
    if not isinstance(batch, PlacedBatch):
        return tensors
    return PlacedBatch(tensors, {key: change(key, value) for key, value in batch.on_cpu.items()})


def kept(batch: Mapping[str, Tensor]) -> Batch:
    """A batch to keep while the loader makes more, which it may do in the same tensors."""
    return changed(batch, lambda key, value: value.clone())


def calibration_batches(
    loader: Iterable[Mapping[str, Any]], device: torch.device, num_samples: int | None, rows_per_example: int = 1
) -> Iterator[Batch]:
    """Batches of tensors on `device`, at most `num_samples` examples in all; the last batch is cut to fit.

    With several rows an example, tensors are (examples, rows an example, ...). Who asks for another batch while one is
    still wanted keeps a copy of that (`kept`).
    """
    left = num_samples
    for number, raw in enumerate(loader if left != 0 else ()):
        batch = _placed({key: value for key, value in _mapping(raw).items() if isinstance(value, Tensor)}, device)
        if rows_per_example > 1:
            batch = changed(batch, lambda key, value: _grouped(key, value, rows_per_example))
        size = batch_size(batch)
        if not size:
            raise FisherError(f"Calibration batch {number} (counted from 0) holds no example; leave empty batches out.")
        if left is not None:
            if size > left:
                batch, size = rows(batch, 0, left), left
            left -= size
        copied = _copies_under_way(raw, device)
        yield batch
        if copied is not None:
            copied.synchronize()  # which are done by now, behind the batch before: little is waited for
        if left == 0:  # and no more is taken: a loader may wait for its next batch, or compute long on it
            return


def _placed(batch: Batch, device: torch.device) -> Batch:
    looked_at = {key: value for key, value in batch.items() if key in LOOKED_AT and value.device.type == "cpu"}
    return PlacedBatch({key: placed(value, device) for key, value in batch.items()}, looked_at)


def _copies_under_way(raw: Mapping[str, Any], device: torch.device) -> torch.cuda.Event | None:
    """When CUDA has copied what lies in pinned memory, which it does not take aside; the loader may fill it again."""
    if device.type != "cuda" or not any(isinstance(value, Tensor) and value.is_pinned() for value in raw.values()):
        return None
    copied: torch.cuda.Event = torch.cuda.current_stream(device).record_event()
    return copied


def _grouped(key: str, value: Tensor, rows_per_example: int) -> Tensor:
    if not value.dim():
        return value
    if value.shape[0] % rows_per_example:
        raise FisherError(
            f"rows_per_example={rows_per_example}: {key!r} has {value.shape[0]} rows, which is no multiple of it."
        )
    return value.reshape(-1, rows_per_example, *value.shape[1:])


def batch_size(batch: Mapping[str, Tensor]) -> int:
    """Number of examples: the first dimension of the labels, else of the first tensor that has one."""
    for key in ("labels", "label", *batch):
        if key in batch and batch[key].dim():
            return batch[key].shape[0]
    raise FisherError("The calibration batch holds no tensor with a batch dimension.")


def rows(batch: Mapping[str, Tensor], start: int, stop: int) -> Batch:
    """Examples `start` to `stop` of a batch; scalars are shared by all examples."""
    size = batch_size(batch)
    if start == 0 and stop == size:
        return changed(batch, lambda key, value: value)
    for key, value in batch.items():
        if value.dim() and value.shape[0] != size:
            raise FisherError(
                f"Cannot split the calibration batch into examples: {key!r} has first dimension {value.shape[0]}, the "
                f"batch has {size} examples. Use a calibration dataloader with batch_size=1."
            )
    return changed(batch, lambda key, value: value[start:stop] if value.dim() else value)


def one_by_one_is_as_fast(batch: Mapping[str, Tensor], gpu: bool | None = None) -> bool:
    """Whether a batch is one example, or few that are long: of these, each fills a CPU by itself, though not a GPU.

    `gpu`: whether it is for one; default: whether the batch is on one.
    """
    size, ids = batch_size(batch), batch.get("input_ids")
    if size == 1 or ids is None or ids.dim() != 2:
        return size == 1
    gpu = ids.device.type != "cpu" if gpu is None else gpu
    return not gpu and size <= FEW and ids.shape[1] >= LONG


def rows_to_look_at(batch: Mapping[str, Tensor], number: int, seed: int, shortest: bool = True) -> list[int]:
    """So many rows with a label that counts, the `shortest` first, where what spills over shows.

    They are drawn: the first row may be the one that a sort, or a search, leaves in its place.
    """
    mask, labels = on_cpu(batch, "attention_mask"), on_cpu(batch, "labels")
    if mask is None or mask.dim() != 2:
        shape = labels.shape if labels is not None and labels.dim() == 2 else (batch_size(batch), 1)
        mask = torch.ones(shape, dtype=torch.long, device="cpu")
    lengths, draw = _lengths(batch, mask).tolist(), random.Random(seed)
    counted = [row for row, length in enumerate(lengths) if length <= mask.shape[1]] or list(range(len(lengths)))
    fewest = min(lengths[row] for row in counted)
    first = draw.choice([row for row in counted if lengths[row] == fewest or not shortest])
    others = [row for row in counted if row != first]
    return [first, *draw.sample(others, min(number - 1, len(others)))]


def padded_rows(batch: Mapping[str, Tensor]) -> dict[Padding, tuple[int, int]]:
    """By the ways in which rows of a text are padded: of those padded so, the rows with the fewest and the most tokens.

    Real ones, that is. One row may reach its padding by little more than rounding in 16 bits, or not at all because its
    length is even, where the other shows it.
    """
    mask = on_cpu(batch, "attention_mask")
    if mask is None or mask.dim() != 2 or bool(mask.all()):
        return {}
    real = mask.bool()
    before, after = (real.cumsum(1) == 0).sum(1), (real.flip(1).cumsum(1) == 0).sum(1)
    within = before + real.sum(1) + after < real.shape[1]
    ways = zip((before > 0).tolist(), within.tolist(), (after > 0).tolist(), strict=True)
    lengths = _lengths(batch, mask).tolist()
    found: dict[Padding, list[int]] = {}
    for row, way in enumerate(ways):
        if any(way):
            found.setdefault(way, []).append(row)
    # Where none of its labels counts, a row has no loss to show anything.
    longest = [length if length <= mask.shape[1] else -1 for length in lengths]
    return {
        way: (min(alike, key=lengths.__getitem__), max(alike, key=longest.__getitem__)) for way, alike in found.items()
    }


def _lengths(batch: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """(n,) real tokens; of a row without a label that counts, more than any has."""
    labels, lengths = on_cpu(batch, "labels"), mask.sum(dim=1)
    if labels is not None and labels.dim() == 2:
        lengths = lengths.masked_fill((labels[:, 1:] == IGNORED).all(dim=1), mask.shape[1] + 1)
    return lengths


def trim_padding(batch: Batch) -> Batch:
    """Cut the columns at either end that are padding in every row: they cost time, and no loss should depend on them.

    A batch with a tensor that is as wide as the tokens, but not known to run along them, is left as it is.
    """
    mask = on_cpu(batch, "attention_mask")
    if mask is None or mask.dim() != 2 or not mask.any():
        return batch
    wide = {key for key, value in batch.items() if value.dim() > 1 and value.shape[1] == mask.shape[1]}
    known = {*SEQUENCE_KEYS, *(() if "labels" in wide and batch["labels"].is_floating_point() else ("labels",))}
    if not wide <= known:
        return batch
    used = mask.any(dim=0).nonzero()
    columns = slice(int(used.min()), int(used.max()) + 1)
    return changed(batch, lambda key, value: value[:, columns] if key in wide else value)


def _mapping(raw: object) -> Mapping[str, Any]:
    if isinstance(raw, Mapping):
        return raw
    # As a dictionary does, which calibration_of gives.
    stars = " Pass what calibration_of gives with two stars: **calibration_of(trainer)." if isinstance(raw, str) else ""
    raise FisherError(
        f"The calibration dataloader gave a {type(raw).__name__}; it must give mappings of argument names to tensors, "
        f"as transformers' data collators do.{stars}"
    )
