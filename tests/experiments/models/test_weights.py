from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from folders import write_bert
from transformers import AutoModel

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.sections import ModelConfig
from fish_tuning.experiments.models import weights
from fish_tuning.experiments.models.weights import weights_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bert(tmp_path / "bert")


def digest(name: Path | str) -> str:
    return weights_digest(ModelConfig(name=str(name)))


def test_only_the_weights_count(folder: Path, tmp_path: Path) -> None:
    before = digest(folder)
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("another page")
    assert digest(tmp_path / "copy") == before
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert digest(folder) != before


def test_every_part_of_sharded_weights_counts(folder: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "parts", max_shard_size="4KB")
    (tmp_path / "parts" / "config.json").write_text((folder / "config.json").read_text())
    parts = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(parts) > 2
    before = digest(tmp_path / "parts")
    content = bytearray(parts[-1].read_bytes())
    content[-1] ^= 1
    parts[-1].write_bytes(content)
    assert digest(tmp_path / "parts") != before


def test_a_folder_without_weights_is_told(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "bare", weights=False)
    with pytest.raises(ConfigurationError, match="has no weights; one of model"):
        digest(folder)


def cache_of(hub: Path, name: str, weights_file: Path) -> None:
    """The hub's cache: a file under the SHA-256 of its bytes, and a link to it in the snapshot."""
    repository = hub / "models--some--bert"
    snapshot = repository / "snapshots" / ("0" * 40)
    for path in (snapshot, repository / "refs", repository / "blobs"):
        path.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    blob = repository / "blobs" / weights.file_digest(weights_file)
    shutil.copy(weights_file, blob)
    (snapshot / name).symlink_to(blob)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_the_hubs_cache_have_the_digest_of_a_folders_and_are_not_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cache_of(tmp_path / "hub", name, folder / "model.safetensors")
    in_folder = digest(folder)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delattr(weights, "file_digest")
    assert digest("some/bert") == in_folder


def test_weights_that_the_hub_does_not_give_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigurationError, match="'nobody/nothing'"):
        digest("nobody/nothing")
