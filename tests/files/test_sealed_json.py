"""Records and trials on disk: every change of a byte is noticed, or changes nothing."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from fuzz import settings
from hypothesis import given
from hypothesis import strategies as st

from fish_tuning.errors import RecordError
from fish_tuning.files.sealed_json import read_sealed, write_sealed

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=8,
)
CONTENT = st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda k: k != "checksum"), VALUES)


@settings()
@given(content=CONTENT)
def test_what_is_written_is_read(content: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("sealed") / "record.json"
    write_sealed(path, content)
    first = path.read_bytes()
    assert read_sealed(path) == (content, True)
    write_sealed(path, content)
    assert path.read_bytes() == first


@settings()
@given(data=st.data())
def test_a_changed_byte_is_noticed_or_changes_nothing(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("sealed") / "record.json"
    content = {"arm": "lora-fish", "seed": 1, "value": 0.8125, "kept": [{"layer": None, "kept": 3}], "error": "ü \n"}
    write_sealed(path, content)
    damaged = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(damaged) - 1))
    if data.draw(st.booleans()):
        damaged[place] ^= data.draw(st.integers(1, 255))
    else:
        del damaged[place:]
    path.write_bytes(damaged)
    with suppress(RecordError):
        found, sealed = read_sealed(path)
        # A change of the key "checksum" itself makes it one more key: the file counts as an older one.
        assert found == content if sealed else len(found) == len(content) + 1


def test_files_of_earlier_versions_have_no_checksum(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"arm": "lora"}')
    assert read_sealed(path) == ({"arm": "lora"}, False)


@pytest.mark.parametrize("text", ["", "[1]", "nonsense", '{"a": ' + "[" * 100_000, '{"a": ' + "9" * 10_000 + "}"])
def test_anything_else_is_one_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"record\.json"):
        read_sealed(path)
