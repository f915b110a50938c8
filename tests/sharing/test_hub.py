"""To the hub and back, on a hub in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_hub import TOKEN, Hub
from huggingface_hub import ModelCard, constants
from tiny import assert_same_tensors
from typer.testing import CliRunner

from fish_tuning import (
    ConfigurationError,
    FishTuningWarning,
    MaskError,
    get_mask,
    load_adapter,
    load_mask,
    pull_adapter,
    push_adapter,
)
from fish_tuning.cli import app

FILES = {
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "fish_mask.safetensors"),
    *("model_config/config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
}


def test_there_and_back(adapter: Path, hub: Hub, tmp_path: Path) -> None:
    address = push_adapter(adapter, "me/first", base_model="google/bert")
    there = hub.repositories["me/first"]
    assert address.startswith(f"{hub.address}/me/first/commit/")
    assert (there.private, set(there.files), len(there.commits)) == (True, FILES, 1)
    assert pull_adapter("me/first", tmp_path / "pulled") == tmp_path / "pulled"
    assert {str(p.relative_to(tmp_path / "pulled")) for p in (tmp_path / "pulled").rglob("*") if p.is_file()} == FILES
    assert_same_tensors(load_mask(tmp_path / "pulled"), load_mask(adapter))
    weights = "adapter_model.safetensors"
    assert (tmp_path / "pulled" / weights).read_bytes() == (adapter / weights).read_bytes()
    assert json.loads((tmp_path / "pulled/adapter_config.json").read_text())["base_model_name_or_path"] == "google/bert"
    card = ModelCard.load(tmp_path / "pulled" / "README.md")
    assert card.data.base_model == "google/bert"
    assert "| base model | `google/bert` |" in card.text


def test_a_local_base_models_path_stays_here(adapter: Path, base_folder: Path, hub: Hub) -> None:
    before = (adapter / "adapter_config.json").read_bytes()
    with pytest.warns(FishTuningWarning, match="'my-bert', goes to the hub, where others cannot load it"):
        push_adapter(adapter, "me/first")
    everything = b"".join(hub.repositories["me/first"].files.values())
    assert str(base_folder.parent).encode() not in everything
    assert b'"base_model_name_or_path": "my-bert"' in everything
    assert (adapter / "adapter_config.json").read_bytes() == before


def test_what_only_resuming_needs_stays_here(adapter: Path, hub: Hub) -> None:
    for name in ("optimizer.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json", ".env"):
        (adapter / name).write_text("secret")
    push_adapter(adapter, "me/first", base_model="google/bert")
    assert set(hub.repositories["me/first"].files) == FILES


def test_a_users_card_on_the_hub_stays(adapter: Path, hub: Hub) -> None:
    push_adapter(adapter, "me/first", base_model="google/bert")
    push_adapter(adapter, "me/first", base_model="google/other")
    there = hub.repositories["me/first"].files
    assert b"google/other" in there["README.md"]  # ours was renewed
    there["README.md"] = b"# My own\n"
    push_adapter(adapter, "me/first", base_model="google/bert")
    assert there["README.md"] == b"# My own\n"
    assert len(hub.repositories["me/first"].commits) == 3


def test_a_model_with_a_mask_pushes_mask_and_card(classifier: Any, hub: Hub) -> None:
    with pytest.warns(FishTuningWarning, match="is a folder of this machine"):
        classifier.push_to_hub("me/model", commit_message="trained", tags=["mine"])
    there = hub.repositories["me/model"]
    assert (set(there.files), there.commits) == (FILES, ["trained"])
    assert b"FISH-Tuning adapter" in there.files["README.md"]


def test_it_is_loaded_by_its_name_there(
    classifier: Any, adapter: Path, base_folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_adapter(adapter, "me/first", base_model="google/bert")
    model = load_adapter("me/first", base_model=base_folder, is_trainable=True)
    assert_same_tensors(dict(sorted(get_mask(model).items())), dict(sorted(get_mask(classifier).items())))


def test_a_mask_that_came_damaged_leaves_nothing(adapter: Path, hub: Hub, tmp_path: Path) -> None:
    push_adapter(adapter, "me/first", base_model="google/bert")
    files = hub.repositories["me/first"].files
    mask = files["fish_mask.safetensors"]
    files["fish_mask.safetensors"] = mask[:-1] + bytes([mask[-1] ^ 1])
    with pytest.raises(MaskError, match=r"'me/first/fish_mask\.safetensors' is damaged"):
        pull_adapter("me/first", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_pull_takes_nothings_place(adapter: Path, hub: Hub, tmp_path: Path) -> None:
    push_adapter(adapter, "me/first", base_model="google/bert")
    before = sorted(adapter.iterdir())
    with pytest.raises(ConfigurationError, match="is there already"):
        pull_adapter("me/first", adapter)
    assert sorted(adapter.iterdir()) == before
    hub.repositories["me/first"].files.pop("adapter_config.json")
    with pytest.raises(ConfigurationError, match="no adapter in 'me/first'"):
        pull_adapter("me/first", tmp_path / "pulled")
    with pytest.raises(ConfigurationError, match="cannot be read from the hub"):
        pull_adapter("me/no-such", tmp_path / "pulled")


@pytest.mark.parametrize(
    ("repo_id", "base_model", "message"),
    [("not a name!", None, "can be no repository's name"), ("me/first", "/tmp/x", "is no name of the hub")],
)
def test_wrong_names_are_refused_before_anything_is_made(
    repo_id: str, base_model: str | None, message: str, adapter: Path, hub: Hub
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        push_adapter(adapter, repo_id, base_model=base_model)
    assert hub.requests == []


def test_a_folder_of_folders_is_refused(adapter: Path, hub: Hub) -> None:
    with pytest.raises(ConfigurationError, match=r"Folders below have one, e\.g\. '.*adapter'"):
        push_adapter(adapter.parent, "me/first")


@pytest.mark.parametrize("part", ["repos/create", "preupload", "/commit/"])
def test_the_hubs_refusal_is_told_without_the_token(part: str, adapter: Path, hub: Hub) -> None:
    hub.refuse[part] = 403
    with pytest.raises(ConfigurationError, match="'me/first' cannot be written") as raised:
        push_adapter(adapter, "me/first", base_model="google/bert", token=TOKEN)
    assert TOKEN not in str(raised.value)
    assert not hub.repositories.get("me/first") or not hub.repositories["me/first"].files


def test_a_branch_is_made_and_a_pull_request_leaves_it_alone(adapter: Path, hub: Hub, tmp_path: Path) -> None:
    push_adapter(adapter, "me/first", base_model="google/bert", revision="dev")
    assert "dev" in hub.repositories["me/first"].branches
    pull_adapter("me/first", tmp_path / "pulled", revision="dev")
    before = dict(hub.repositories["me/first"].files)
    (adapter / "more.txt").write_text("more")
    address = push_adapter(adapter, "me/first", base_model="google/bert", create_pr=True)
    assert address == f"{hub.address}/me/first/discussions/1"
    assert hub.repositories["me/first"].files == before
    done = CliRunner().invoke(app, ["push", str(adapter), "me/first", "--base-model", "google/bert", "--create-pr"])
    assert (done.exit_code, done.stdout) == (0, f"pull request: {address}\n")


def test_what_the_hub_answers_often_is_told_with_the_way_out(
    adapter: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_adapter(adapter, "me/first", base_model="google/bert")
    with pytest.raises(ConfigurationError, match="from the hub: it has no such revision"):
        pull_adapter("me/first", tmp_path / "pulled", revision="v1")
    with pytest.raises(ConfigurationError, match=r"there is no such repository, or it may not be read .*hf auth login"):
        pull_adapter("me/no-such", tmp_path / "pulled")
    pull_adapter("me/first", tmp_path / "cached")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(ConfigurationError, match=r"be written: the hub wants a token.* or set HF_TOKEN"):
        push_adapter(adapter, "me/first", base_model="google/bert")
    with pytest.raises(ConfigurationError, match="from the hub: the hub wants a token"):  # though the cache has it
        pull_adapter("me/first", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_what_comes_from_the_cache_alone_is_told(
    adapter: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_adapter(adapter, "me/first", base_model="google/bert")
    pull_adapter("me/first", tmp_path / "pulled")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.warns(FishTuningWarning, match="The hub cannot be reached .*cache had of 'me/first'"):
        pull_adapter("me/first", tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").is_file()


def test_a_repository_without_an_adapter_is_told_by_its_name(adapter: Path, hub: Hub, tmp_path: Path) -> None:
    push_adapter(adapter, "me/first", base_model="google/bert")
    files = hub.repositories["me/first"].files
    del files["adapter_model.safetensors"]
    with pytest.raises(ConfigurationError, match="adapter in 'me/first' has no weights"):
        pull_adapter("me/first", tmp_path / "pulled")
    files.clear()
    with pytest.raises(ConfigurationError, match=r"no adapter in 'me/first': it has no adapter_config\.json"):
        pull_adapter("me/first", tmp_path / "pulled")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", "{", "adapter_config.json' is not readable JSON"),
        ("adapter_config.json", "[]", "is no adapter's configuration"),
        ("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": 5}', "must be a name or a path"),
        ("tokenizer_config.json", "{", "adapter/tokenizer_config.json' is not readable JSON"),
    ],
)
def test_a_damaged_folder_is_not_pushed(name: str, content: str, message: str, adapter: Path, hub: Hub) -> None:
    (adapter / name).write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        push_adapter(adapter, "me/first", base_model="google/bert")
    assert not hub.repositories
    with pytest.raises(ConfigurationError, match="is a file, and no folder of an adapter"):
        push_adapter(adapter / name, "me/first")


@pytest.mark.slow
def test_the_commands_speak_with_the_endpoint_of_the_environment(
    adapter: Path, hub: Hub, tmp_path: Path, python_environment: dict[str, str]
) -> None:
    environment = python_environment | {
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        whole = [sys.executable, "-m", "fish_tuning", *arguments]
        return subprocess.run(whole, env=environment, capture_output=True, text=True, check=False)

    done = command("push", str(adapter), "me/first")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pushed: http://127.0.0.1")
    assert "note: The adapter's base model is a folder of this machine" in done.stderr
    assert hub.repositories["me/first"].private is True
    done = command("pull", "me/first", str(tmp_path / "pulled"))
    assert (done.returncode, done.stdout) == (0, f"written: {tmp_path / 'pulled'}\n"), done.stderr
    done = command("pull", "me/first", str(tmp_path / "pulled"))
    assert done.returncode == 2
    assert "is there already" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
