"""Texts and images to predict on, from files, folders or the command line, and predictions to a file."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from fish_tuning.errors import ConfigurationError, did_you_mean
from fish_tuning.files.atomic import write_atomically

READ = (".csv", ".tsv", ".json", ".jsonl", ".txt")
WRITTEN = (".csv", ".json", ".jsonl")
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TEXT = "text"  # the column of a text that has no name
IMAGE = "image"  # the column of image files
# Columns of answers, which a file to predict on may have too.
_ANSWERS = ("label", "labels", "target", "class", "score", "completion", "response", "answer", "output", "id", "idx")
_HALF = re.compile("[\ud800-\udfff]")
_NUMBER = re.compile(r"[-+]?\d*\.?\d+")

Row = dict[str, Any]


def read_rows(source: str) -> list[Row]:
    """The rows of the file `source`, an image or the images of a folder, or `source` itself as the text of one row.

    Raises ConfigurationError for a file that is not there, of another kind, damaged or empty, and for a folder without
    images.
    """
    if not source.strip():
        raise ConfigurationError("The text to predict on is empty.")
    file = Path(source)
    suffix = file.suffix.lower()
    if _is(file, Path.is_dir):
        images = sorted(path for path in file.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
        if not images:
            raise ConfigurationError(f"The folder {source!r} has no images ({', '.join(IMAGES)}).")
        return [{IMAGE: str(path)} for path in images]
    if _is(file, Path.is_file) and suffix in IMAGES:
        return [{IMAGE: source}]
    if not _is(file, Path.is_file):
        if suffix in (*READ, *IMAGES) and not any(map(str.isspace, source)):
            raise ConfigurationError(f"There is no file {source!r}.{did_you_mean(file.name, _beside(file))}")
        return _check_characters([{TEXT: source}])
    if suffix not in READ:
        raise ConfigurationError(
            f"{source!r} cannot be read: {suffix or 'no ending'} is none of {', '.join(READ + IMAGES)}."
        )
    try:
        rows = _parsed(file.read_text(encoding="utf-8-sig"), suffix)
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{source!r} is not in UTF-8 (byte {error.object[error.start]:#04x} at {error.start}). Save it in UTF-8: "
            "iconv -f latin1 -t utf-8."
        ) from error
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ConfigurationError(f"{source!r} is not readable as {suffix[1:]}: {error}") from error
    if not rows:
        raise ConfigurationError(f"{source!r} has no rows.")
    _check_characters(rows)
    return [{**row, IMAGE: _image_beside(row[IMAGE], file)} if IMAGE in row else row for row in rows]


def _check_characters(rows: list[Row]) -> list[Row]:
    """Refuse what no file and no tokenizer can hold: halves of pairs, which bytes that are no UTF-8 become, too."""
    for number, row in enumerate(rows, 1):
        if found := _HALF.search(json.dumps(row, ensure_ascii=False, default=str)):
            raise ConfigurationError(
                f"Row {number} of what is predicted on holds {found[0].encode('unicode_escape').decode()}, half of a "
                "character, as bytes that are not in UTF-8 leave it. Mend the text, or save it in UTF-8."
            )
    return rows


def _image_beside(image: Any, file: Path) -> Any:
    """An image of a file's row, which may be named from where the file lies."""
    if not isinstance(image, str) or _is(Path(image), Path.is_file):
        return image
    beside = file.parent / image
    return str(beside) if _is(beside, Path.is_file) else image


def has_images(rows: Sequence[Row], asked: Sequence[str] = ()) -> bool:
    """Whether the rows are of images, which stand in a column of that name."""
    return tuple(asked) in ((), (IMAGE,)) and bool(rows) and all(IMAGE in row for row in rows)


def read_image(image: Any) -> Any:
    """A PIL image in three channels, as training reads it, of a file or of a PIL image.

    Raises ConfigurationError for what is no image that can be read.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigurationError("Images are read with Pillow, which is not installed: pip install pillow.") from error
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, TypeError, AttributeError, Image.DecompressionBombError) as error:
        raise ConfigurationError(f"{str(image)!r} is no image that can be read: {error}") from error


def check_columns(rows: Sequence[Row], asked: Sequence[str] = ()) -> None:
    """Refuse columns that are not there, and rows without a text, before a model is loaded to read them."""
    found = _names(rows)
    for name in asked:
        if name not in found:
            raise ConfigurationError(
                f"There is no column {name!r}; found: {', '.join(found)}.{did_you_mean(name, found)}"
            )
    if not asked and not _texts(rows):
        text_columns(rows)


def text_columns(rows: Sequence[Row], asked: Sequence[str] = (), labels: Collection[str] = ()) -> tuple[str, ...]:
    """The one or two columns whose texts the model reads: those asked for, else the only ones that can be meant.

    A column of nothing but `labels`, or of numbers, has the answers, where another has texts.
    """
    if asked:
        check_columns(rows, asked)
    found, texts = _names(rows), _texts(rows)
    others = [name for name in texts if not _answers((row[name] for row in rows), labels)]
    chosen = tuple(asked or others or texts)
    if len(chosen) not in (1, 2):
        raise ConfigurationError(
            f"One or two columns of texts are needed, found {len(chosen)} ({', '.join(chosen) or 'none'}) among "
            f"{', '.join(found)}. Name them with --text-column."
        )
    for name in chosen:
        wrong = next((number for number, row in enumerate(rows, 1) if not isinstance(row.get(name), str)), None)
        if wrong is not None:
            raise ConfigurationError(f"The column {name!r} has no text in row {wrong}.")
    _check_characters([{name: row[name] for name in chosen} for row in rows])
    return chosen


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _texts(rows: Sequence[Row]) -> list[str]:
    """The columns of texts that are not called as answers are."""
    return [
        name
        for name in _names(rows)
        if name.lower() not in _ANSWERS and all(isinstance(row.get(name), str) for row in rows)
    ]


def _answers(texts: Iterable[str], labels: Collection[str]) -> bool:
    return all(text.strip() in labels or _NUMBER.fullmatch(text.strip()) for text in texts)


def check_output(file: Path, source: str, *, force: bool = False) -> None:
    """Refuse a file that could not be written or is there already, before anything is predicted.

    `force` lets go of one that is there, but not of the `source`, what is predicted on.
    """
    if file.suffix.lower() not in WRITTEN:
        raise ConfigurationError(f"{str(file)!r} cannot be written: it must end with {', '.join(WRITTEN)}.")
    if not file.absolute().parent.is_dir():
        raise ConfigurationError(f"There is no folder {str(file.parent)!r} to write {file.name!r} to.")
    if file.is_dir():
        raise ConfigurationError(f"{str(file)!r} is a folder. Name a file.")
    if file.exists() and os.path.exists(source) and file.samefile(source):
        raise ConfigurationError(f"{str(file)!r} is what is predicted on, and is not overwritten. Name another file.")
    if file.exists() and not force:
        raise ConfigurationError(f"{str(file)!r} is there already. Name another, or replace it with --force.")


def written(rows: Sequence[Row], suffix: str) -> str:
    """The rows as the text of a file with this ending."""
    if suffix == ".json":
        return json.dumps(list(rows), indent=2, ensure_ascii=False) + "\n"
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def write_rows(rows: Sequence[Row], file: Path) -> None:
    """Write the file, whole or not at all."""
    write_atomically(file, written(rows, file.suffix.lower()).encode())


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _beside(file: Path) -> list[str]:
    """Names of files that could be meant."""
    try:
        return [each.name for each in file.parent.iterdir() if each.suffix.lower() in (*READ, *IMAGES)]
    except OSError:
        return []


def _is(path: Path, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(path)
    except (OSError, ValueError):  # a long text is no possible name
        return False


def _json_line(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is no JSON: {error.msg} at column {error.colno}") from error


def _parsed(text: str, suffix: str) -> list[Row]:
    """`text` as `read_text` gives it: its lines end with \\n alone, which `splitlines` does not stop at."""
    if suffix == ".txt":
        return [{TEXT: line} for line in text.split("\n") if line.strip()]
    if suffix in (".csv", ".tsv"):
        reader = csv.DictReader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ",", strict=True)
        names = list(reader.fieldnames or ())
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"two columns are called {twice[0]!r}")
        rows = []
        most = csv.field_size_limit(2**31 - 1)  # a text may be longer than the module's 131,072 characters
        try:
            for row in reader:
                if None in row:
                    raise ValueError(f"line {reader.line_num} has more cells than there are names of columns")
                rows.append(dict(row))
        finally:
            csv.field_size_limit(most)
        return rows
    if suffix == ".json":
        content = json.loads(text)
        content = content if isinstance(content, list) else [content]
    else:
        content = [_json_line(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = [{TEXT: row} if isinstance(row, str) else row for row in content]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("each row must be an object with columns, or a text")
    return rows
