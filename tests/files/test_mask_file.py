from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fish_tuning import MaskError, load_mask, save_mask


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


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MaskError, match=r"no mask file at '.*nothing.safetensors'"):
        load_mask(tmp_path / "nothing.safetensors")
    with pytest.raises(MaskError, match="no mask file"):
        load_mask(tmp_path)


def test_other_safetensors_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "adapter.safetensors")
    with pytest.raises(MaskError, match="not a mask"):
        load_mask(tmp_path / "adapter.safetensors")


def test_broken_file(tmp_path: Path) -> None:
    save_mask({"a": torch.rand(100) > 0.5}, tmp_path / "mask.safetensors")
    whole = (tmp_path / "mask.safetensors").read_bytes()
    for content in (b"", b"nonsense", whole[:-3]):
        (tmp_path / "mask.safetensors").write_bytes(content)
        with pytest.raises(MaskError, match="not a readable safetensors file"):
            load_mask(tmp_path / "mask.safetensors")
