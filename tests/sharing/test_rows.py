"""Rows to predict on, as files hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fish_tuning import ConfigurationError
from fish_tuning.sharing.rows import read_rows, text_columns

# Line breaks to Python's splitlines alone, which texts from pages and PDFs hold.
UNBROKEN = "one\u2028two\u0085three\x0cfour\x1dfive"


def test_only_ends_of_lines_end_a_row(tmp_path: Path) -> None:
    texts = [UNBROKEN, "last"]
    for suffix, content in (
        ("txt", "\r\n".join(texts)),
        ("jsonl", "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)),
        ("csv", "text\n" + "\n".join(texts)),
    ):
        file = tmp_path / f"in.{suffix}"
        file.write_text(content, encoding="utf-8", newline="")
        assert read_rows(str(file)) == [{"text": text} for text in texts]


def test_halves_of_characters_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": "b \\ud800 c"}\n')
    for source in (str(tmp_path / "in.jsonl"), "caf\udce9"):  # as Python reads bytes of a command line
        with pytest.raises(ConfigurationError, match=r"Row . .* holds \\ud.*, half of a character"):
            read_rows(source)
    with pytest.raises(ConfigurationError, match="Row 1"):
        text_columns([{"text": "\udce9"}])


def test_a_cell_may_hold_a_long_text(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(f"text\n{'x' * 200_000}\n")
    assert len(read_rows(str(tmp_path / "in.csv"))[0]["text"]) == 200_000
