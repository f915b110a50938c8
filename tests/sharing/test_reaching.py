"""A hub that cannot be reached is told at once, once; one that answers is left to the libraries and their retries."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_hub import Hub, Repository
from huggingface_hub import constants
from transformers import BertConfig

from fish_tuning import ConfigurationError, load_adapter, merge_adapter
from fish_tuning.experiments.config.sections import ModelConfig
from fish_tuning.experiments.models.building import read_config
from fish_tuning.sharing import reaching
from fish_tuning.sharing.predicting import predict
from fish_tuning.sharing.reaching import TRANSPORT, hub_arguments

NOWHERE = "http://127.0.0.1:9"  # the port of `discard`, at which nothing listens
TOLD = (
    r"'someone/no-model' is no folder here and not in the cache \(.*\), and the hub \(http://127.0.0.1:9\) cannot be "
)
ASK: dict[str, Any] = {"asked": "The base model ", "way_out": "Give a folder."}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited; libraries that wait for themselves fail the test."""
    waited: list[float] = []
    monkeypatch.setattr(reaching.time, "sleep", waited.append)
    return waited


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waits: list[float]) -> None:
    for name, value in {
        "ENDPOINT": NOWHERE,
        "HUGGINGFACE_CO_URL_TEMPLATE": NOWHERE + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
    }.items():
        monkeypatch.setattr(constants, name, value)


@pytest.fixture
def cached(tmp_path: Path) -> str:
    """A model's configuration in the hub's cache."""
    folder = tmp_path / "hub-cache" / "models--someone--small"
    commit = "1" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    BertConfig(hidden_size=16).save_pretrained(folder / "snapshots" / commit)
    return "someone/small"


@pytest.fixture
def far_adapter(adapter: Path) -> Path:
    """One whose base model is of the hub."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "someone/no-model"}))
    return adapter


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "use",
    [
        lambda folder, _: load_adapter(folder),
        lambda folder, _: predict(folder, [{"text": "a fine film"}]),
        lambda folder, new: merge_adapter(folder, new),
    ],
    ids=["load", "predict", "merge"],
)
def test_a_base_model_that_cannot_be_reached_is_told_once(
    use: Callable[[Path, Path], Any],
    far_adapter: Path,
    tmp_path: Path,
    waits: list[float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = rf"^The adapter's base model {TOLD}reached: .*refused.*base_model=.*--base-model.*HF_HUB_OFFLINE=1"
    with caplog.at_level(logging.WARNING), pytest.raises(ConfigurationError, match=told):
        use(far_adapter, tmp_path / "new")
    assert caplog.records == []
    assert waits == [0, 1, 2]


@pytest.mark.usefixtures("no_network")
def test_a_model_of_an_experiment_that_cannot_be_reached_is_told_once(
    waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(ConfigurationError, match=f"^model.name: {TOLD}reached"):
        read_config(ModelConfig(name="someone/no-model"))
    assert (caplog.records, waits) == ([], [0, 1, 2])


@pytest.mark.usefixtures("no_network")
def test_what_is_cached_is_used_without_waiting(cached: str, waits: list[float]) -> None:
    assert hub_arguments(cached, **ASK) == {"local_files_only": True}
    waits.clear()
    assert read_config(ModelConfig(name=cached)).hidden_size == 16
    assert waits == [0, 1, 2]  # ours alone


@pytest.mark.usefixtures("no_network")
def test_folders_and_offline_mode_ask_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaching, "get_hf_file_metadata", None)
    assert hub_arguments(str(tmp_path), **ASK) == {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_arguments("someone/no-model", **ASK) == {}


def test_a_hub_that_answers_is_left_to_the_libraries(hub: Hub, waits: list[float]) -> None:
    hub.repositories["someone/small"] = Repository(False, {"config.json": b"{}"})
    hub.refuse["someone/broken"] = 503
    for name in ("someone/small", "someone/no-model", "someone/broken"):
        assert hub_arguments(name, **ASK) == {}
    assert waits == [0, 0, 0]


def test_a_network_that_fails_for_a_moment_is_waited_for(
    hub: Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["someone/small"] = Repository(False, {"config.json": b"{}"})
    real, failures = reaching.get_hf_file_metadata, [TRANSPORT("down"), TRANSPORT("down")]

    def flaky(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(reaching, "get_hf_file_metadata", flaky)
    assert hub_arguments("someone/small", **ASK) == {}
    assert waits == [0, 1, 2]
