"""Processes that drew their models apart score the first one's; each has its own back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import once_in_two_processes
from tiny import assert_same_tensors, assert_scores_close, bert, classification_batch, lora, rebatch, tensors

from fish_tuning import FishTuningWarning, calculate_fisher_information, calculate_scores
from fish_tuning.scores import one_start

BATCH = classification_batch((5, 9, 3, 7, 9, 4, 8, 6))


def scored(model: Any, score: str = "fisher", **options: Any) -> Any:
    return calculate_scores(model, rebatch(BATCH, 2), score, progress=False, **options)


def told(model: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FishTuningWarning)
        calculate_fisher_information(model, rebatch(BATCH, 2), progress=False)
    return [f"{Path(each.filename).name}: {each.message}" for each in caught]


def worker(rank: int, folder: Path) -> dict[str, Any]:
    models = [lora(bert(), seed=rank) for _ in range(2)]
    before = tensors(models[0])
    results: dict[str, Any] = {
        "fisher": scored(models[0]),
        "sensitivity": scored(models[0], "sensitivity"),
        "warm": scored(models[0], warmup_steps=3),
        "kept": all(torch.equal(tensor, before[name]) for name, tensor in tensors(models[0]).items()),
        "told": told(models[0]),
    }
    with mock.patch.object(dist, "broadcast", side_effect=AssertionError("sent")):
        results["the same"] = scored(lora(bert()))
    with torch.no_grad():
        models[1].base_model.model.bert.encoder.layer[1].output.dense.weight.add_(rank)
    results["frozen apart"] = told(models[1])
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return once_in_two_processes(worker, tmp_path_factory, "one_start")


def test_what_the_first_process_drew_is_scored(results: list[dict[str, Any]]) -> None:
    for how, options in (("fisher", {}), ("sensitivity", {"score": "sensitivity"}), ("warm", {"warmup_steps": 3})):
        for result in results:
            assert_scores_close(result[how], scored(lora(bert()), **options), tolerance=1e-5)
        assert_same_tensors(*(result[how] for result in results))


def test_each_has_its_own_back(results: list[dict[str, Any]]) -> None:
    assert [result["kept"] for result in results] == [True, True]


def test_nothing_is_sent_where_all_have_the_same(results: list[dict[str, Any]]) -> None:
    assert all(result["the same"] for result in results)


def test_frozen_weights_that_differ_are_told(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["told"] == []
        (message,) = result["frozen apart"]
        assert message.startswith("test_one_start.py: ")
        assert "layer.1.output.dense.weight', which is frozen, is not the same in all processes" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_checksums_tell_signs_and_places(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(one_start._CHUNK, "cpu", 2)
    rows = [[1, -1, 1, 1, 2], [-1, 1, 1, 1, 2], [1, 1, 1, -1, 2], [1, -1, 2, 1, 1], [1, 1, -1, 1, 2]]
    sums = one_start._checksums(torch.tensor(row, dtype=torch.float32).to(dtype) for row in rows)
    assert len(set(sums)) == len(rows)
    whole = torch.arange(6, dtype=torch.float32).view(2, 3).to(dtype)
    turned, copied, other = one_start._checksums([whole.T, whole.T.contiguous(), whole])
    assert turned == copied != other
    assert one_start._checksums([torch.zeros((), dtype=dtype), torch.zeros(0, dtype=dtype)]) == [0, 0]
