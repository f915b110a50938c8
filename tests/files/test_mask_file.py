from __future__ import annotations

from pathlib import Path

import torch

from fish_tuning import load_mask, save_mask


def test_masks_come_back_as_they_were(tmp_path: Path) -> None:
    masks = {
        "odd": torch.rand(3, 5) > 0.5,
        "column": (torch.rand(4, 6) > 0.5).T,  # not contiguous
        "none": torch.zeros(7, dtype=torch.bool),
        "all": torch.ones(2, 2, 2, dtype=torch.bool),
        "scalar": torch.tensor(True),
        "empty": torch.zeros(0, 4, dtype=torch.bool),
    }
    save_mask(masks, tmp_path / "mask.safetensors")
    loaded = load_mask(str(tmp_path / "mask.safetensors"))
    assert loaded.keys() == masks.keys()
    for name, mask in masks.items():
        assert loaded[name].dtype == torch.bool
        assert torch.equal(loaded[name], mask), name


def test_eight_entries_a_byte(tmp_path: Path) -> None:
    save_mask({"a": torch.rand(1000, 800) > 0.5}, tmp_path / "mask.safetensors")
    assert 100_000 <= (tmp_path / "mask.safetensors").stat().st_size < 101_000
