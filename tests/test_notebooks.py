"""The notebooks run from top to bottom, on small local models, and hold what they print."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset
from folders import WORDS, sentences, write_bert, write_llama
from notebooks import code_cells, run
from transformers import TrainingArguments

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FISH_TUNING_DATASET", raising=False)
    original = TrainingArguments.__post_init__

    def on_the_cpu(self: TrainingArguments) -> None:
        self.use_cpu = True
        original(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_the_cpu)
    return tmp_path


def write_data(folder: Path, column: str, number: int = 48) -> str:
    folder.mkdir()
    for split, seed in (("train", 0), ("validation", 1)):
        texts, labels = sentences(number, seed)
        texts = [text if column == "sentence" else " ".join([text, *WORDS * 2]) for text in texts]
        Dataset.from_dict({column: texts, "label": labels}).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def test_the_encoder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISH_TUNING_MODEL", str(write_bert(here / "model")))
    monkeypatch.setenv("FISH_TUNING_DATASET", write_data(here / "data", "sentence"))
    told = run(FOLDER / "encoder.ipynb")
    assert "['adapter_model.safetensors', 'fish_mask.safetensors']" in told[-1]
    before, after = map(float, re.findall(r"accuracy (\S+) before, (\S+) after", told[-2])[0])
    assert 0 <= before <= 1
    assert 0 <= after <= 1
    kept = {place: int(number) for place, number in re.findall(r"^(.*?) +(\d+) of", told[4], re.MULTILINE)}
    assert kept.pop("head") == 2 * 16 + 2
    assert sum(kept.values()) == round(0.05 * 2 * 3 * 2 * 16 * 16)  # two layers, q k v, A and B, rank 16, width 16


def test_the_decoder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="needs trl: pip install 'fish-tuning[trl]'")
    monkeypatch.setenv("FISH_TUNING_MODEL", str(write_llama(here / "model")))
    monkeypatch.setenv("FISH_TUNING_DATASET", write_data(here / "data", "text"))
    told = run(FOLDER / "decoder.ipynb")
    kept, pool = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) of ([\d,]+) entries", told[2])[0])
    assert kept == round(0.25 * pool)
    before, after = map(float, re.findall(r"loss (\S+) before, (\S+) after", told[2])[0])
    assert after < before
    assert "fish_mask.safetensors" in told[-1]


def test_the_smoke_test(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISH_TUNING_MODEL", str(write_llama(here / "model")))
    assert run(FOLDER / "smoke_test.ipynb")[-1] == "all is well\n"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.ipynb")), ids=lambda file: file.stem)
def test_it_holds_its_outputs(file: Path) -> None:
    notebook = json.loads(file.read_text())
    assert any(cell["outputs"] for cell in code_cells(notebook))
    assert [cell["execution_count"] for cell in code_cells(notebook)] == [
        number + 1 for number in range(len(code_cells(notebook)))
    ]
    text = file.read_text()
    assert len(text) < 20_000
    for told in (line for cell in code_cells(notebook) for output in cell["outputs"] for line in output["text"]):
        assert "/" not in told, told  # no folder of the machine that it was run on
