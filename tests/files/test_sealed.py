"""What every sealed file promises, of whatever kind: whole, the same bytes each time, and no damage unseen."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fish_tuning import FishTuningWarning, MaskError, load_delta, load_mask, save_mask
from fish_tuning.files.atomic import disk_full
from fish_tuning.files.delta_file import Delta, DeltaTensor, write_delta
from fish_tuning.files.sealed import kind_of, write_sealed
from fish_tuning.files.sparse_adapter_file import (
    SparseAdapter,
    SparseTensor,
    Start,
    load_sparse_adapter,
    state_digest,
    write_sparse_adapter,
)

DIGEST = "float32:" + "0" * 64
MASK = {"b.weight": torch.tensor([[True, False, True], [False, True, True]]), "a": torch.ones(16, dtype=torch.bool)}
DELTA = Delta(
    {
        "weight": DeltaTensor(torch.tensor([1.5, -2.0]), torch.tensor([3, 7]).int(), torch.Size([4, 3]), DIGEST),
        "half": DeltaTensor(torch.ones(1).half(), torch.tensor([0]), torch.Size([1]), "float16:" + "a" * 64),
        "bias": DeltaTensor(torch.arange(3.0), None, torch.Size([3]), None),
    }
)


PLACES = torch.tensor([0, 2, 5]).int()
SEEDED, ZERO = Start(True, 0.5, "float32"), Start(False, 0.0, "bfloat16")
SPARSE = SparseAdapter(
    adapter_name="default",
    config='{"peft_type": "LORA", "base_model_name_or_path": "base"}',
    metadata={"format": "pt"},
    seed=7,
    tensors=(
        SparseTensor("a.weight", "a.default.weight", torch.Size([2, 4]), torch.float32, PLACES, torch.ones(3), SEEDED),
        SparseTensor("b", None, torch.Size([4]), torch.bfloat16, None, torch.zeros(0), ZERO),
        SparseTensor("c", "c.default.weight", torch.Size([3]), torch.float16, None, torch.ones(3).half(), None),
    ),
    base=(("layer", (4, 2), (12, 3)), ("packed", (8,), (None, None))),
    digest="0" * 64,
)
SPARSE = dataclasses.replace(SPARSE, digest=state_digest({each.key: each.dense(7) for each in SPARSE.tensors}))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, SparseAdapter):
        bare = [dataclasses.replace(each, tensors=()) for each in (one, other)]
        return (
            bare[0] == bare[1]
            and same(one.state_dict(), other.state_dict())
            and same(one.mask(), other.mask())
            and [(each.key, each.name, each.start) for each in one.tensors]
            == [(each.key, each.name, each.start) for each in other.tensors]
        )
    if isinstance(one, Delta):
        return one.tensors.keys() == other.tensors.keys() and all(
            same(tensor.values, other.tensors[name].values)
            and (tensor.shape, tensor.digest) == (other.tensors[name].shape, other.tensors[name].digest)
            and same(tensor.index, other.tensors[name].index)
            for name, tensor in one.tensors.items()
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if one is None or other is None:
        return one is other
    # By the bits: NaN is NaN.
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    )


KINDS: dict[str, tuple[Callable[..., Any], Callable[[Path], Any], Any]] = {
    "mask": (save_mask, load_mask, MASK),
    "delta": (write_delta, load_delta, DELTA),
    "sparse adapter": (write_sparse_adapter, load_sparse_adapter, SPARSE),
}
EITHER = pytest.mark.parametrize(("write", "load", "content"), KINDS.values(), ids=KINDS)


# Any content, any damage


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
names = st.from_regex(r"[a-z]{1,4}(\.[a-z0-9_]{1,4}){0,2}", fullmatch=True) | st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4
)


def of_shape(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) > 0.5


@st.composite
def masks(draw: st.DrawFn) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    return {name: of_shape(draw(shapes), generator) for name in draw(st.lists(names, unique=True, max_size=4))}


@st.composite
def deltas(draw: st.DrawFn) -> Delta:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    tensors = {}
    for name in draw(st.lists(names, unique=True, max_size=4)):
        shape = torch.Size(draw(shapes))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
        index = (
            of_shape(shape, generator).flatten().nonzero()[:, 0].to(draw(st.sampled_from([torch.int32, torch.int64])))
        )
        if len(index) and draw(st.booleans()):
            tensors[name] = DeltaTensor(torch.randn(len(index), generator=generator).to(dtype), index, shape, DIGEST)
        else:
            tensors[name] = DeltaTensor(torch.randn(shape, generator=generator).to(dtype), None, shape, None)
    return Delta(tensors)


@fuzz.settings()
@given(content=masks() | deltas())
def test_any_content_comes_back(content: Any, tmp_path: Path) -> None:
    write, load, _ = KINDS["delta" if isinstance(content, Delta) else "mask"]
    write(content, tmp_path / "file")
    first = (tmp_path / "file").read_bytes()
    loaded = load(tmp_path / "file")
    assert same(loaded, content)
    write(loaded, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == first


@EITHER
def test_any_damage_is_seen_or_changes_nothing(
    write: Callable[..., Any], load: Callable[[Path], Any], content: Any, tmp_path: Path
) -> None:
    write(content, tmp_path / "file")
    whole = (tmp_path / "file").read_bytes()

    @fuzz.settings()
    @given(damage=fuzz.damages)
    def test(damage: fuzz.Damage) -> None:
        (tmp_path / "file").write_bytes(fuzz.damaged(whole, damage))
        try:
            loaded = load(tmp_path / "file")
        except MaskError as error:
            assert str(tmp_path / "file") in str(error)  # noqa: PT017
        else:
            assert same(loaded, content)

    test()


@EITHER
def test_every_flipped_bit_of_the_content_is_seen(
    write: Callable[..., Any], load: Callable[[Path], Any], content: Any, tmp_path: Path
) -> None:
    write(content, tmp_path / "file")
    whole = (tmp_path / "file").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for bit in range(8 * start, 8 * len(whole), 1 if len(whole) - start < 200 else 7):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "file").write_bytes(flipped)
        with pytest.raises(MaskError, match="damaged"):
            load(tmp_path / "file")


@EITHER
def test_a_file_that_was_cut_is_seen(
    write: Callable[..., Any], load: Callable[[Path], Any], content: Any, tmp_path: Path
) -> None:
    write(content, tmp_path / "file")
    whole = (tmp_path / "file").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "file").write_bytes(whole[:length])
        with pytest.raises(MaskError, match="not a readable safetensors file"):
            load(tmp_path / "file")


# The same bytes each time


def test_bytes_depend_on_the_content_alone(tmp_path: Path, python_environment: dict[str, str]) -> None:
    save_mask(MASK, tmp_path / "one")
    save_mask(dict(reversed(MASK.items())), tmp_path / "other")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    code = "import sys, fish_tuning as f; f.save_mask(f.load_mask(sys.argv[1]), sys.argv[2])"
    for seed in "01":
        environment = {**python_environment, "PYTHONHASHSEED": seed}
        arguments = [sys.executable, "-c", code, str(tmp_path / "one"), str(tmp_path / seed)]
        subprocess.run(arguments, env=environment, check=True)
        assert (tmp_path / seed).read_bytes() == (tmp_path / "one").read_bytes()


# Headers that lie: the checksum is right, the content is not what they say


MASK_LIES: dict[str, tuple[Any, dict[str, Tensor], str]] = {
    "missing": ({"a": [8], "b": [8]}, {"a": torch.zeros(1)}, "'b' that its header describes is missing"),
    "extra": ({}, {"a": torch.zeros(1)}, "does not describe the tensor 'a'"),
    "two gigabytes": ({"a": [2**34]}, {"a": torch.zeros(1)}, "takes 2,147,483,648 bytes"),
    "too few": ({"a": [8]}, {"a": torch.zeros(2)}, "takes 1 bytes"),
    "two dimensions": ({"a": [16]}, {"a": torch.zeros(1, 2)}, r"of the shape \(1, 2\)"),
    "negative": ({"a": [-8]}, {"a": torch.zeros(1)}, "no possible shape"),
    "no shape": ({"a": {"shape": [8]}}, {"a": torch.zeros(1)}, "no possible shape"),
    "no number": ({"a": [8.0]}, {"a": torch.zeros(1)}, "no possible shape"),
    "true": ({"a": [True]}, {"a": torch.zeros(1)}, "no possible shape"),
    "endless": ({"a": [0, 2**62, 2**62]}, {"a": torch.zeros(0)}, "no possible shape"),
    "padding": ({"a": [7]}, {"a": torch.ones(1)}, "bits behind the last entry of 'a'"),
}


@pytest.mark.parametrize(("header", "tensors", "message"), MASK_LIES.values(), ids=MASK_LIES)
def test_masks_that_are_not_what_they_say(
    header: Any, tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mask"
    write_sealed(path, "mask", header, {name: tensor.to(torch.uint8) for name, tensor in tensors.items()})
    with pytest.raises(MaskError, match=message):
        load_mask(path)


def test_mask_of_another_dtype(tmp_path: Path) -> None:
    write_sealed(tmp_path / "mask", "mask", {"a": [8]}, {"a": torch.zeros(1, dtype=torch.int8)})
    with pytest.raises(MaskError, match=r"the file has torch.int8 of the shape \(1,\)"):
        load_mask(tmp_path / "mask")


def described(**changes: Any) -> dict[str, Any]:
    return {"shape": [4, 3], "dtype": "float32", "digest": DIGEST} | changes


def parts(index: list[int] | None, values: Tensor | None = None, dtype: torch.dtype = torch.int32) -> dict[str, Tensor]:
    content = {"values:w": torch.ones(len(index or [])) if values is None else values}
    return content if index is None else content | {"index:w": torch.tensor(index, dtype=dtype)}


DELTA_LIES: dict[str, tuple[Any, dict[str, Tensor], str]] = {
    "too large": (described(), parts([0, 12]), "positions outside of its 12 entries"),
    "negative": (described(), parts([-1, 3]), "positions outside"),
    "twice": (described(), parts([3, 3]), "positions that do not ascend"),
    "disordered": (described(), parts([4, 2]), "positions that do not ascend"),
    "fewer": (described(), parts([1], torch.ones(2)), r"positions of the shape \(1,\) and values of the shape \(2,\)"),
    "none": (described(), parts([]), "positions of the shape"),
    "of floats": (described(), parts([1], torch.ones(1), torch.float32), "positions of float32"),
    "without positions": (described(), parts(None, torch.ones(4, 3)), "'index:w' that its header describes is missing"),
    "with positions": (described(digest=None), parts([1]), "does not describe the tensor 'index:w'"),
    "whole, other shape": (described(digest=None), parts(None, torch.ones(3, 4)), "values of the shape"),
    "other dtype": (described(dtype="float16"), parts([1]), "values of float32, and its header says float16"),
    "no digest": (described(digest="x"), parts([1]), "does not describe 'w' as a tensor of a delta"),
    "no number": (described(shape="x"), parts([1]), "does not describe 'w'"),
    "more keys": (described(more=1), parts([1]), "does not describe 'w'"),
    "a list": ([], parts([1]), "does not describe 'w'"),
    "extra": (described(), parts([1]) | {"values:v": torch.ones(1)}, "does not describe the tensor 'values:v'"),
}


@pytest.mark.parametrize(("header", "tensors", "message"), DELTA_LIES.values(), ids=DELTA_LIES)
def test_deltas_that_are_not_what_they_say(
    header: Any, tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    write_sealed(tmp_path / "delta", "delta", {"w": header}, tensors)
    with pytest.raises(MaskError, match=message):
        load_delta(tmp_path / "delta")


# Headers that are none


def header(**changes: Any) -> str:
    return json.dumps({"format": "fish_tuning.mask.v2", "sha256": "0", "tensors": {}} | changes)


BAD_HEADERS: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "not readable JSON"),
    "endless brackets": ("[" * 100_000, "not readable JSON"),
    "endless number": ('{"format": ' + "1" * 5_000 + "}", "not readable JSON"),
    "a list": ("[]", "its header is not one of fish-tuning"),
    "more keys": (header(more=1), "its header is not one of fish-tuning"),
    "other format": (header(format="x"), "not a mask: it holds nothing of fish-tuning"),
    "no format": (header(format=[1]), "not a mask: it holds nothing of fish-tuning"),
    "other kind": (header(format="fish_tuning.delta.v2"), "not a mask: it holds a delta"),
    "later version": (header(format="fish_tuning.mask.v3"), "has the format v3; .* reads v1 and v2"),
    "tensors are a list": (header(tensors=[]), "does not describe its tensors"),
    "wrong checksum": (header(), "not what its checksum"),
}


@pytest.mark.parametrize(("text", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_headers_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    save_file({}, tmp_path / "mask", metadata={"fish_tuning": text})
    with pytest.raises(MaskError, match=rf"mask'.*{message}"):
        load_mask(tmp_path / "mask")


@EITHER
def test_files_of_others(write: Callable[..., Any], load: Callable[[Path], Any], content: Any, tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "plain", metadata={"format": "pt"})
    with pytest.raises(MaskError, match=r"is a safetensors file, but not a .*: it holds nothing of fish-tuning's"):
        load(tmp_path / "plain")
    assert kind_of(tmp_path / "plain") is None
    write(content, tmp_path / "own")
    assert kind_of(tmp_path / "own") == next(kind for kind, (_, _, each) in KINDS.items() if each is content)
    for nothing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(
            MaskError, match=r"There is no (mask|delta|sparse adapter) file at '.*'|The folder '.*' has no fish_mask"
        ):
            load(nothing)
        with pytest.raises(MaskError, match="There is no file at"):
            kind_of(nothing)


@EITHER
def test_a_mistyped_file_gets_its_neighbour(
    write: Callable[..., Any], load: Callable[[Path], Any], content: Any, tmp_path: Path
) -> None:
    write(content, tmp_path / "reviews.safetensors")
    with pytest.raises(MaskError, match=r"Did you mean 'reviews\.safetensors'\?"):
        load(tmp_path / "revews.safetensors")


# The first version


def v1_mask(path: Path, shapes: Any, content: dict[str, Tensor]) -> None:
    save_file(content, path, metadata={"format": "fish_tuning.mask.v1", "shapes": json.dumps(shapes)})


def test_masks_of_the_first_version_load_with_a_warning(tmp_path: Path) -> None:
    v1_mask(tmp_path / "mask", {"a": [2, 3]}, {"a": torch.tensor([0b10110000], dtype=torch.uint8)})
    with pytest.warns(FishTuningWarning, match="mask' was written by an earlier version, without a checksum") as caught:
        loaded = load_mask(tmp_path / "mask")
    assert caught[0].filename == __file__
    assert loaded["a"].tolist() == [[True, False, True], [True, False, False]]


@pytest.mark.filterwarnings("ignore::fish_tuning.FishTuningWarning")
def test_what_can_be_checked_of_the_first_version_is(tmp_path: Path) -> None:
    one = {"a": torch.zeros(1, dtype=torch.uint8)}
    for shapes, content, message in (
        ({"a": [2**34]}, one, "takes 2,147,483,648 bytes"),
        ({"b": [8]}, one, "'b' that its header describes is missing"),
        ({}, one, "does not describe the tensor 'a'"),
        ([], one, "does not describe its tensors"),
        ({"a": [3]}, {"a": torch.full((1,), 255, dtype=torch.uint8)}, "bits behind the last entry"),
    ):
        v1_mask(tmp_path / "mask", shapes, content)
        with pytest.raises(MaskError, match=message):
            load_mask(tmp_path / "mask")
    save_file(one, tmp_path / "mask", metadata={"format": "fish_tuning.mask.v1"})
    with pytest.raises(MaskError, match="not readable JSON"):
        load_mask(tmp_path / "mask")


def test_deltas_of_the_first_version_load_with_a_warning(tmp_path: Path) -> None:
    write_delta(DELTA, tmp_path / "delta")
    with safe_open(tmp_path / "delta", framework="pt") as file:
        tensors = json.loads(file.metadata()["fish_tuning"])["tensors"]
    metadata = {"format": "fish_tuning.delta.v1", "tensors": json.dumps(tensors)}
    save_file(load_file(tmp_path / "delta"), tmp_path / "old", metadata=metadata)
    with pytest.warns(FishTuningWarning, match="earlier version"):
        assert same(load_delta(tmp_path / "old"), DELTA)


# Writing


@EITHER
def test_where_no_file_can_be(
    write: Callable[..., Any], load: Callable[[Path], Any], content: Any, tmp_path: Path
) -> None:
    with pytest.raises(MaskError, match=r"There is no folder '.*nowhere' to write the [a-z ]+ file 'file' to"):
        write(content, tmp_path / "nowhere" / "file")
    with pytest.raises(MaskError, match="is a folder; give the name of the"):
        write(content, tmp_path)


@EITHER
def test_full_disk_keeps_its_error_and_the_old_file(
    write: Callable[..., Any],
    load: Callable[[Path], Any],
    content: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(content, tmp_path / "file")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write(content, tmp_path / "file")
    assert disk_full(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert same(load(tmp_path / "file"), content)


def test_masks_are_bool(tmp_path: Path) -> None:
    with pytest.raises(MaskError, match=r"The mask of 'a' is torch.float32; a mask holds torch.bool"):
        save_mask({"a": torch.ones(3)}, tmp_path / "mask")
    assert not any(tmp_path.iterdir())
