"""Whatever lies in an adapter's folder: it is read, or one MaskError names the file."""

from __future__ import annotations

import json
from pathlib import Path

import fuzz
import pytest
import torch
from hypothesis import given
from safetensors.torch import save_file

from fish_tuning import MaskError, save_mask
from fish_tuning.experiments.masks.mask_files import read_mask

NAMES = ["adapter_config.json", "adapter_model.safetensors", "fish_mask.safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_any_damage_is_one_error_that_names_the_file(name: str, tmp_path: Path) -> None:
    weights = {"base_model.model.query.lora_A.weight": torch.ones(2, 4), "base_model.model.head.bias": torch.ones(2)}
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"modules_to_save": ["head"], "r": 2}))
    if name == "fish_mask.safetensors":
        save_mask({"base_model.model.query.lora_A.default.weight": torch.ones(2, 4) > 0}, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    expected = read_mask(str(tmp_path))

    @fuzz.settings()
    @given(damage=fuzz.damages)
    def test(damage: fuzz.Damage) -> None:
        (tmp_path / name).write_bytes(fuzz.damaged(whole, damage))
        try:
            read = read_mask(str(tmp_path))
        except MaskError as error:
            assert str(tmp_path / name) in str(error)  # noqa: PT017
        else:
            assert read.path == expected.path

    test()
