"""The Python of the README and of one document runs as it is printed, with local folders under the hub's names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from folders import write_bert, write_sentences

README = Path(__file__).parents[1] / "README.md"
SPARSE_ADAPTERS = README.parent / "docs" / "sparse-adapters.md"


def blocks(language: str, document: Path = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.DOTALL | re.MULTILINE)


def test_python_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_bert(tmp_path / "bert-base-cased")
    write_sentences(tmp_path / "rotten_tomatoes")
    script = "\n".join(blocks("python"))
    assert "calculate_fisher_information(" in script
    exec(compile(script, str(README), "exec"), {})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_sparse_adapters_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_bert(tmp_path / "bert-base-cased")
    write_sentences(tmp_path / "rotten_tomatoes")
    script = "\n".join(blocks("python", SPARSE_ADAPTERS))
    names: dict[str, object] = {}
    exec(compile(script, str(SPARSE_ADAPTERS), "exec"), names)
    sizes = [(tmp_path / path).stat().st_size for path in ("sst2.safetensors", "adapter/adapter_model.safetensors")]
    assert sizes[0] < sizes[1]
    assert names["tasks"] == ["sst2", "reviews"]


def test_the_yaml_is_the_shipped_experiment() -> None:
    shipped = README.parent / "configs" / "experiments" / "my_experiment.yaml"
    lines = [line for line in shipped.read_text().splitlines() if not line.startswith("#")]
    assert blocks("yaml") == ["\n".join(lines) + "\n"]
