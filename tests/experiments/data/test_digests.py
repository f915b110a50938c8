from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from datasets import Dataset

from fish_tuning.experiments.data.digests import data_digest, file_digest, folder_digest

ROWS = {"input_ids": [[1, 2], [3], [4, 5]], "labels": [0, 1, 0]}


def test_the_same_content_has_the_same_digest_wherever_it_comes_from() -> None:
    data = Dataset.from_dict(ROWS)
    longer = Dataset.from_dict({key: [*values, values[0]] for key, values in ROWS.items()})
    assert data_digest(data) == data_digest(longer.select(range(3))) == data_digest(data.select([0, 1, 2]))


def test_content_and_order_count() -> None:
    data = Dataset.from_dict(ROWS)
    digests = {data_digest(data), data_digest(data.select([1, 0, 2])), data_digest(data.select([0, 1])),
               data_digest(data, data), data_digest(Dataset.from_dict({**ROWS, "labels": [0, 1, 1]}))}  # fmt: skip
    assert len(digests) == 5


def test_a_file_is_read_again_only_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    before = file_digest(file)
    assert before == hashlib.sha256(b"one").hexdigest()
    with monkeypatch.context() as patch:
        patch.delattr(hashlib, "file_digest")
        assert file_digest(file) == before
    file.write_bytes(b"two")
    os.utime(file, ns=(0, 1))
    assert file_digest(file) == hashlib.sha256(b"two").hexdigest()


def test_a_folders_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    def folder(name: str, **files: str) -> Path:
        for file, text in files.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file).write_text(text)
        return tmp_path / name

    one = folder_digest(folder("one", a="1", b="2"))
    assert one == folder_digest(folder("two", b="2", a="1"))
    assert one != folder_digest(folder("three", a="2", b="1"))
    more = folder("four", a="1", b="2", note="3")
    assert one == folder_digest(more, leave_out=("note",)) == folder_digest(more, "?")
    assert one != folder_digest(more)
