"""The Python of docs/sharing.md runs as it is printed, with a local folder under the base model's name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fake_hub import Hub
from folders import write_bert
from huggingface_hub import ModelCard

PAGE = Path(__file__).parents[2] / "docs" / "sharing.md"


def test_python_runs_as_printed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_bert(tmp_path / "bert-base-cased")
    script = "\n".join(re.findall(r"^<!-- tested[^\n]*-->\n```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.M))
    assert script.count("import") > 5
    exec(compile(script, str(PAGE), "exec"), found := {})
    assert found["model"].config.id2label == {0: "bad", 1: "fair", 2: "good"}
    card = ModelCard.load(tmp_path / "from-the-hub" / "README.md")
    assert card.data.base_model == "google-bert/bert-base-cased"
    assert "# Reviews in three classes" in card.text
    assert (tmp_path / "merged" / "model.safetensors").is_file()
