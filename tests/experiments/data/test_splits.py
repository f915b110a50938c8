from __future__ import annotations

import errno
import logging
from pathlib import Path
from unittest.mock import patch

import pytest
from datasets import Dataset
from folders import write_sentences
from task_helpers import task_of

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.neighbours import DATA_FILES
from fish_tuning.experiments.config.sections import DatasetConfig
from fish_tuning.experiments.data.splits import FILE_FORMATS
from fish_tuning.experiments.data.tasks import load_task


def test_the_command_knows_the_formats_without_importing_them() -> None:
    assert tuple(FILE_FORMATS) == DATA_FILES


def test_the_training_part_is_the_same_every_time(sentences_folder: Path) -> None:
    one, two = (task_of(sentences_folder, max_train_samples=10).train["text"] for _ in range(2))
    assert list(one) == list(two)
    assert len(one) == 10


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no folder"):
        task_of(tmp_path / "nowhere")


def test_an_unknown_hub_name_is_told() -> None:
    with pytest.raises(ConfigurationError, match="no-such-data"):
        load_task(DatasetConfig(load_args=["no-such-data"]))


def test_one_split_alone_is_refused(tmp_path: Path) -> None:
    folder = write_sentences(tmp_path / "d")
    (folder / "validation.parquet").unlink()
    with pytest.raises(ConfigurationError, match=r"dataset\.validation_split: none of the usual names"):
        task_of(folder)


def test_a_file_an_empty_folder_and_broken_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no data was found .*; a folder of csv, json or parquet"):
        task_of(tmp_path)
    file = tmp_path / "train.json"
    file.write_text('{"text": "a"')
    with pytest.raises(ConfigurationError, match="is a file; a folder of csv, json or parquet"):
        task_of(file)
    with pytest.raises(ConfigurationError, match="cannot be loaded: JSON parse error"):
        task_of(tmp_path)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_single_files_are_splits(tmp_path: Path, ending: str) -> None:
    rows = Dataset.from_dict({"text": ["good", "bad"] * 3, "label": [1, 0] * 3})
    files = {}
    for split in ("train", "validation"):
        files[split] = str(tmp_path / f"{split}.{ending}")
        if ending in ("csv", "tsv"):
            rows.to_csv(files[split], sep="\t" if ending == "tsv" else ",")
        else:
            (rows.to_json if ending == "jsonl" else rows.to_parquet)(files[split])
    task = load_task(DatasetConfig(data_files=files))
    assert (task.name, task.columns, len(task.train), task.num_labels) == (tmp_path.name, ("text",), 6, 2)


@pytest.mark.parametrize("of_folder", [False, True])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_what_reads_like_nothing_is_a_text_and_a_class(tmp_path: Path, ending: str, of_folder: bool) -> None:
    sep = "," if ending == "csv" else "\t"
    rows = [("text", "label"), ("NA", "None"), ("null", "good"), ("fine", "good")]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.{ending}").write_text("".join(f"{sep.join(row)}\n" for row in rows))
    files = {split: str(tmp_path / f"{split}.{ending}") for split in ("train", "validation")}
    task = load_task(DatasetConfig(load_args=[str(tmp_path)]) if of_folder else DatasetConfig(data_files=files))
    assert task.train["text"][:2] == ["NA", "null"]
    assert task.num_labels == 2
    (tmp_path / f"train.{ending}").write_text(f"text{sep}label\n{sep}good\nfine{sep}bad\n")
    with pytest.raises(ConfigurationError, match="is empty"):
        load_task(DatasetConfig(data_files=files))


def test_a_cache_that_cannot_be_made_is_told_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,1\nb,0\n")

    def load(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/nowhere/cache")

    monkeypatch.setattr("fish_tuning.experiments.data.splits.load_dataset", load)
    with pytest.raises(ConfigurationError, match=r"cannot be loaded: '/nowhere/cache': No such file or directory\.$"):
        load_task(DatasetConfig(load_args=[str(tmp_path)]))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train.csv", "gone.csv"), r"there is no file '.*gone\.csv'"),
        (("reviews.csv", "gone-revews.csv"), r"there is no file .*\. Did you mean '.*/reviews\.csv'\?"),
        (("train.csv", "dev.jsonl"), "must be of one format"),
        (("train.txt", "train.txt"), r"which the name's end tells: \.csv, \.tsv, \.json"),
    ],
)
def test_files_that_cannot_be_splits_are_told(tmp_path: Path, names: tuple[str, str], message: str) -> None:
    for name in names:
        if "gone" not in name:
            (tmp_path / name).write_text("text,label\na,1\n")
    files = dict(zip(("train", "validation"), (str(tmp_path / name) for name in names), strict=True))
    with pytest.raises(ConfigurationError, match=message):
        load_task(DatasetConfig(data_files=files))


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "a.csv", "cannot be read: it is empty."),
        (b"text,label\n", "a.csv", "cannot be read: it has no rows."),
        ("text,label\ncaf\u00e9,1\n".encode("latin-1"), "a.csv", r"not in UTF-8 \(byte 0xe9 .*Save it in UTF-8"),
        (b"{", "a.json", "cannot be read: JSON parse error"),
        (None, "a.csv", "'.*a.csv' is a folder. Name files"),
    ],
)
def test_damaged_files_are_told_once(
    content: bytes | None, name: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / name
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    datasets_logger = logging.getLogger("datasets")
    with (
        patch.object(datasets_logger, "propagate", new=True),
        pytest.raises(ConfigurationError, match=message),
    ):
        load_task(DatasetConfig(data_files={"train": str(file)}))
    assert not caplog.records


def test_a_share_of_the_training_split_can_be_held_out(tmp_path: Path) -> None:
    folder = write_sentences(tmp_path / "d", train=40)
    (folder / "validation.parquet").unlink()
    one, two = (task_of(folder, validation_split=0.25) for _ in range(2))
    assert (len(one.train), len(one.validation)) == (30, 10)
    assert list(one.validation["text"]) == list(two.validation["text"])


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="above 0 and below 1"):
        DatasetConfig(load_args=["d"], validation_split=share)


def test_a_share_that_leaves_nothing_is_refused(sentences_folder: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"validation_split=0\.001: of the 48 rows of 'train' that leaves none"
    ):
        task_of(sentences_folder, validation_split=0.001)
