"""Sizes of files that were not written, against files that are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from tiny import bert, random_mask
from torch import nn

from fish_tuning import apply_mask, save_delta, save_mask
from fish_tuning.files.sizes import Described, delta_size, mask_size, safetensors_size


@pytest.mark.parametrize("number", [0, 1, 7, 130])
def test_safetensors_files(number: int) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float16, torch.int32]
    tensors = {f'a.{i}.ä"b': torch.zeros(i, 2, dtype=dtypes[i % len(dtypes)]) for i in range(number)}
    described = {name: Described(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    for metadata in (None, {"format": "pt"}, {"k": '{"quoted": "\\\\"}'}):
        assert safetensors_size(described, metadata) == len(save(tensors, metadata=metadata))


def test_mask_files(tmp_path: Path) -> None:
    mask = random_mask(bert(), 0.3)
    save_mask(mask, tmp_path / "mask")
    assert mask_size({name: tuple(own.shape) for name, own in mask.items()}) == (tmp_path / "mask").stat().st_size


def test_delta_files(tmp_path: Path) -> None:
    model: nn.Module = bert()
    mask = random_mask(model, 0.3, dense=["classifier"])
    tensors = {name: Described(p.dtype, tuple(p.shape)) for name, p in model.named_parameters()}
    kept = {name: int(own.sum()) for name, own in mask.items() if not own.all()}
    apply_mask(model, mask)
    save_delta(model, tmp_path / "delta")
    assert delta_size(tensors, kept) == (tmp_path / "delta").stat().st_size
