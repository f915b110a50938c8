from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import ViTForImageClassification

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.loading import load_experiment
from fish_tuning.experiments.data import builtin
from fish_tuning.experiments.data.builtin import resolve_builtin
from fish_tuning.experiments.run.plan import plan_experiment


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FISH_TUNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_other_names_are_left_alone() -> None:
    assert resolve_builtin("bert-base-cased") == "bert-base-cased"


def test_an_unknown_one_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'builtin:digits'"):
        resolve_builtin("builtin:digit")


def test_digits_are_the_upper_half_of_the_real_ones() -> None:
    splits = load_dataset(resolve_builtin("builtin:digits"))
    assert (len(splits["train"]), len(splits["validation"])) == (300, 596)
    assert splits["train"].features["label"].names == ["5", "6", "7", "8", "9"]
    assert set(splits["train"]["label"]) == set(range(5))
    pixels = torch.tensor(splits["validation"][0]["pixel_values"])
    assert pixels.shape == (1, 8, 8)
    assert pixels.min() >= -1
    assert pixels.max() <= 1


def test_the_vit_is_made_once_and_has_no_head(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(builtin, "PRETRAIN_EPOCHS", 1)
    folder = resolve_builtin("builtin:digits-vit")
    one, two = (ViTForImageClassification.from_pretrained(folder, num_labels=5) for _ in range(2))
    assert not torch.equal(one.classifier.weight, two.classifier.weight)
    assert torch.equal(one.vit.layernorm.weight, two.vit.layernorm.weight)
    made = Path(folder, "model.safetensors").stat().st_mtime_ns
    assert resolve_builtin("builtin:digits-vit") == folder
    assert Path(folder, "model.safetensors").stat().st_mtime_ns == made


def test_an_interrupted_making_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setitem(builtin._MAKERS, "builtin:digits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve_builtin("builtin:digits")
    assert [path.name for path in cache.iterdir()] == [".digits.lock"]


def test_a_damaged_one_is_made_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(builtin, "PRETRAIN_EPOCHS", 1)
    weights = Path(resolve_builtin("builtin:digits-vit"), "model.safetensors")
    content = weights.read_bytes()
    caplog.clear()
    flipped = bytearray(content)
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    resolve_builtin("builtin:digits-vit")
    assert f"The files in {weights.parent} are not those that were made; they are made again." in caplog.messages
    assert weights.read_bytes() == content


def test_one_without_a_digest_is_made_again(cache: Path) -> None:
    folder = Path(resolve_builtin("builtin:digits"))
    (folder / builtin.DIGEST_FILE).unlink()
    (folder / "train.parquet").write_bytes(b"of another version")
    assert len(load_dataset(resolve_builtin("builtin:digits"))["train"]) == 300


def test_counting_trains_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(folder: Path) -> None:
        raise AssertionError("pretrained")

    monkeypatch.setitem(builtin._MAKERS, "builtin:digits-vit", trained)
    plan = plan_experiment(load_experiment("digits"))
    assert [arm.trainable_parameters for arm in plan.arms] == [*[3397] * 4, 325]
    assert not (cache / "digits-vit").exists()
