"""Texts with images, videos or sounds beside them: whether a batch has these in its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.errors import FisherError
from fish_tuning.scores.batches import on_cpu

Tokens = dict[str, list[int]]  # by kind: the ids that stand for it in a text
_KINDS = ("image", "video", "audio")
_SOUNDS = ("input_features", "input_values")
_IN_ROWS = 5  # dimensions of images that lie in the batch's rows, with blank ones where a row has fewer


def media_tokens(model: nn.Module) -> Tokens:
    """As the model's configuration says, or a part of it."""
    config = getattr(model, "config", None)
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "to_dict"))] if config else []
    found: Tokens = {}
    for kind in _KINDS:
        names = (f"{kind}_token_id", f"{kind}_token_index")
        ids = {value for part in parts for name in names if isinstance(value := getattr(part, name, None), int)}
        found[kind] = sorted(ids)
    return found


def rows_by_data(batch: Mapping[str, Tensor], tokens: Tokens) -> bool:
    """Whether data decide how many images a row has, and blank ones are there to be left out.

    FisherError where a batch has as many images as rows, but not one a row: then nothing splits it into examples.
    """
    ids, found = batch.get("input_ids"), False
    if ids is None or ids.dim() != 2 or len(ids) < 2:
        return False
    for key, kind in _media(batch, len(ids)):
        in_rows = kind == "image" and batch[key].dim() >= _IN_ROWS and "image_sizes" not in batch
        numbers = _numbers(batch, tokens[kind])
        if not in_rows and numbers is not None and (numbers == 0).any() and (numbers > 0).any():
            told = ", ".join(map(str, numbers.tolist()[:8])) + (", ..." if len(numbers) > 8 else "")
            raise FisherError(
                f"Cannot split the calibration batch into examples: {key!r} has as many entries as the batch has rows, "
                f"{len(ids)}, but they are not one a row (the rows have {told} {kind} tokens). Where the {kind}s per "
                "row differ, use a calibration dataloader with batch_size=1."
            )
        if in_rows and batch[key].shape[1] > 1:
            found |= numbers is None or not bool((numbers == numbers[0]).all())
    return found


def beside_texts(model: nn.Module) -> set[nn.Module]:
    """The modules that may see images: all but those around the embeddings of tokens, and the output layer."""
    modules = dict(model.named_modules())
    words, output = _of(model, "get_input_embeddings"), _of(model, "get_output_embeddings")
    place = next((path for path, module in modules.items() if module is words), None)
    text: set[nn.Module] = set() if output is None else set(output.modules())
    while place:
        inside = list(modules[place].modules())
        if any(isinstance(module, (nn.Conv2d, nn.Conv3d)) for module in inside):
            break
        text |= set(inside)
        place = place.rpartition(".")[0]
    return set(modules.values()) - text


def _media(batch: Mapping[str, Tensor], rows: int) -> Iterator[tuple[str, str]]:
    """The batch's tensors of images, videos and sounds that have as many entries as it has rows, each with its kind."""
    for key, value in batch.items():
        if value.dim() < 2 or value.shape[0] != rows or not value.is_floating_point():
            continue
        if "video" in key:
            yield key, "video"
        elif "audio" in key or key in _SOUNDS:
            yield key, "audio"
        elif "pixel" in key or "image" in key:
            yield key, "image"


def _numbers(batch: Mapping[str, Tensor], tokens: list[int]) -> Tensor | None:
    """(n,) how many of the tokens each row has; None where it cannot be told."""
    ids = on_cpu(batch, "input_ids")
    if ids is None or not tokens:
        return None
    numbers = torch.isin(ids, torch.tensor(tokens)).sum(dim=1)
    return numbers if bool(numbers.any()) else None


def _of(model: Any, name: str) -> nn.Module | None:
    try:
        found = getattr(model, name)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None
