"""What a sealed file must not be believed, though its checksum is right; the rest is in `test_sealed.py`."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_sealed import SPARSE
from torch import Tensor

from fish_tuning import MaskError, load_sparse_adapter
from fish_tuning.files.sealed import write_sealed
from fish_tuning.files.sparse_adapter_file import KIND, Start, key_of, write_sparse_adapter


def described(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    stored = load_file(path)
    return json.loads(zlib.decompress(stored["description"].numpy().tobytes())), stored


def seal(path: Path, description: Any, stored: dict[str, Tensor]) -> None:
    packed = zlib.compress(json.dumps(description).encode())
    write_sealed(path, KIND, {}, stored | {"description": torch.frombuffer(bytearray(packed), dtype=torch.uint8)})


def set_entry(number: int, part: int, value: Any) -> Callable[[Any, Any], None]:
    def change(description: Any, stored: Any) -> None:
        description["tensors"][number][part] = value

    return change


def set_key(key: str, value: Any) -> Callable[[Any, Any], None]:
    return lambda description, stored: description.update({key: value})


LIES: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "more places": (set_entry(0, 3, [4, 0, 1]), "4 places"),
    "fewer places": (set_entry(0, 3, [2, 0, 1]), "2 places"),
    "places of another tensor": (set_entry(0, 1, [2, 2]), "do not hold 3 places below 4"),
    "places past the end": (set_entry(0, 3, [3, 0, 100]), r"the places \[3, 0, 100\] are impossible"),
    "places left over": (set_entry(0, 3, None), "more places or values than its tensors"),
    "a negative shape": (set_entry(0, 1, [-8]), "not described as a tensor"),
    "another dtype": (set_entry(0, 2, "bfloat16"), "values:bfloat16"),
    "no dtype": (set_entry(0, 2, "Tensor"), "impossible start"),
    "a seedless start": (set_key("seed", None), "impossible start"),
    "a configuration that is none": (set_key("model_config", "[]"), "model_config is no object"),
    "an impossible length": (set_key("max_length", 0), "texts of 0 tokens"),
    "a large seed": (set_key("seed", 2**16), "the seed 65536 is impossible"),
    "a start of nothing": (set_entry(1, 4, [False, "x", "float32"]), "could not convert"),
    "a start through nothing": (set_entry(1, 4, [False, 0.0, "frombuffer"]), "impossible start"),
    "a whole tensor of another shape": (set_entry(2, 1, [4]), "'c' is stored in another shape"),
    "no whole tensor": (lambda description, stored: stored.pop("whole:c"), "whole:c"),
    "another whole tensor": (
        lambda description, stored: stored.update({"whole:d": torch.ones(3)}),
        "does not describe the tensor 'whole:d'",
    ),
    "no configuration": (set_key("config", "[]"), "its adapter_config.json is no object"),
    "half a configuration": (set_key("config", "{"), "Expecting property name"),
    "numbers for texts": (set_key("digest", 3), "where texts belong"),
    "no tensors": (lambda description, stored: description.pop("tensors"), "'tensors'"),
    "deep": (set_key("config", "[" * 10**5), "maximum recursion depth"),
}


@pytest.mark.parametrize(("change", "message"), LIES.values(), ids=LIES)
def test_descriptions_that_lie(change: Callable[[Any, Any], Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    write_sparse_adapter(SPARSE, path)
    description, stored = described(path)
    change(description, stored)
    seal(path, description, stored)
    with pytest.raises(MaskError, match=f"adapter.safetensors' is damaged: .*{message}"):
        load_sparse_adapter(path)


def test_a_description_that_is_too_long_is_not_inflated(tmp_path: Path) -> None:
    write_sparse_adapter(SPARSE, tmp_path / "file")
    stored = load_file(tmp_path / "file")
    bomb = bytearray(zlib.compress(b" " * (2**26 + 1), 1))
    write_sealed(tmp_path / "file", KIND, {}, stored | {"description": torch.frombuffer(bomb, dtype=torch.uint8)})
    with pytest.raises(MaskError, match="cut off, or too long"):
        load_sparse_adapter(tmp_path / "file")


def test_an_adapter_that_is_not_the_saved_one_is_not_handed_out() -> None:
    changed = dataclasses.replace(SPARSE, seed=8)
    with pytest.raises(MaskError, match="not the one that was saved"):
        changed.state_dict()


def test_what_it_holds() -> None:
    assert SPARSE.num_parameters == 6
    assert repr(SPARSE) == "SparseAdapter(LORA, 6 trained parameters of 15, base 'base')"
    mask = SPARSE.mask()
    assert mask["a.default.weight"].tolist() == [[True, False, True, False], [False, True, False, False]]
    assert mask["c.default.weight"].all()
    assert mask.keys() == {"a.default.weight", "c.default.weight"}
    state = SPARSE.state_dict()
    assert state["a.weight"][mask["a.default.weight"]].tolist() == [1, 1, 1]
    assert 0 < state["a.weight"][~mask["a.default.weight"]].abs().max() < 0.5
    assert state["b"].dtype == torch.bfloat16


def test_a_seeded_start_needs_a_seed() -> None:
    with pytest.raises(MaskError, match="'a' starts from a seed, and the sparse adapter names none"):
        Start(True, 1.0, "float32").tensor(None, "a", torch.Size([2]), torch.float32)


def test_minus_zero_is_a_start_of_its_own() -> None:
    made = Start(False, -0.0, "float32").tensor(None, "a", torch.Size([2]), torch.float32)
    assert torch.signbit(made).all()


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("base_model.model.l.query.lora_A.default.weight", "base_model.model.l.query.lora_A.weight"),
        ("base_model.model.default.lora_A.default.weight", "base_model.model.default.lora_A.weight"),
        ("base_model.model.e.lora_embedding_A.default", "base_model.model.e.lora_embedding_A"),
        ("base_model.model.classifier.modules_to_save.default.weight", "base_model.model.classifier.weight"),
        ("base_model.model.l.query.base_layer.bias", "base_model.model.l.query.base_layer.bias"),
    ],
)
def test_keys_of_names(name: str, key: str) -> None:
    assert key_of(name, "default") == key
