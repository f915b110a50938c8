"""What a GPU would be waited for while scoring, seen on a device that torch is made to believe in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from device_waits import DeviceWaits
from tiny import assert_scores_close

from fish_tuning.scores.reading import placed, read

SCRIPT = Path(__file__).parents[1] / "helpers/scoring_on_a_device.py"
CASES = (
    "classes", "padding on the left", "few tokens count", "drawn labels", "mean gradients", "one at a time", "warm-up",
    "gain", "batches there", "all weights", "start",
)  # fmt: skip
WITHOUT_FLOAT64 = [
    f"{name} without float64"
    for name in ("mean gradients", "all weights", "entries", "components", "scores in float64")
]
MORE = 2  # batches whose waits are counted
# In all, whatever the number of batches: the first batch's proof, and what is looked at before and after.
MOST_WAITS = 16


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    here = {"CUDA_VISIBLE_DEVICES": "", "FISH_TUNING_DEVICE": "cpu"}  # torch knows one kind of device a process
    environment = {**os.environ, **here, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path])}
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("case", [*CASES, *WITHOUT_FLOAT64])
def test_scores_are_those_of_the_cpu(found: dict[str, Any], case: str) -> None:
    here, there = (
        {name: torch.tensor(values).float() for name, values in found[case][place].items()}
        for place in ("cpu", "scores")
    )
    assert_scores_close(there, here, tolerance=1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("batches there", "all weights")])
def test_no_batch_after_the_first_is_waited_for(found: dict[str, Any], case: str) -> None:
    assert found[case]["added"] == {}
    assert found[case]["waits"] <= MOST_WAITS, found[case]
    assert found[case]["copies"] >= MORE * 3  # their tensors were seen on the way


def test_a_batch_that_is_there_is_waited_for_once_a_tensor_that_is_looked_at(found: dict[str, Any]) -> None:
    (number,) = found["batches there"]["added"].values()
    assert number == MORE * 2  # mask and labels


def test_embeddings_and_rules_without_a_proof_are_all_that_waits(found: dict[str, Any]) -> None:
    """Which rows of a table are read decides the size of its gradient; the keys' biases never have one to prove."""
    kinds = {line.partition(" at ")[0] for line in found["all weights"]["added"]}
    assert kinds == {"_unique2", "copy to the host"}
    assert sum(found["all weights"]["added"].values()) <= MORE * (3 * 2 + 4)  # three tables, twice; four reads


def test_errors_are_told_before_scores_are(found: dict[str, Any]) -> None:
    assert "calibration example 3 is not finite" in found["not finite"]
    assert "word_embeddings.weight' holds NaN" in found["not finite"]
    assert "Calibration example 7 has the label 7" in found["out of range"]


def test_float64_that_a_device_has_not_is_refused_by_name(found: dict[str, Any]) -> None:
    assert "scores_dtype=torch.float64: pretend" in found["float64 there"]
    assert "scores_device='cpu'" in found["float64 there"]


def test_tensors_are_read_together() -> None:
    given = [torch.ones(2, 3), torch.arange(4), torch.zeros(()), torch.ones(0)]
    assert all(one.equal(other) for one, other in zip(read(given), given, strict=True))
    assert read([]) == []
    assert placed(given[0], torch.device("cpu")) is given[0]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: float(x.sum()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool((x > 0).all()),
        lambda x: x.unique(),
        lambda x: x.equal(x),
        lambda x: x.masked_fill_(x > 0, 0).__setitem__(x > 0, 1),
        lambda x: x.masked_select(x > 0),
        lambda x: x.repeat_interleave(torch.ones_like(x).long()),
        lambda x: x.tolist(),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=x.device),
        lambda x: x + torch.arange(3),
    ],
)
def test_the_count_sees_each_kind(wait: Any) -> None:
    with DeviceWaits() as waits:
        wait(torch.ones_like(torch.empty(3, device="cpu")))
    assert waits.counts.total() >= 1


def test_the_count_passes_over_what_goes_on() -> None:
    x = torch.ones(3, device="cpu")
    with DeviceWaits() as waits:
        (x * 2 + x.sum()).masked_fill(x > 0, 1).index_select(0, x.long()).repeat_interleave(2).clamp_(min=1)
        torch.where(x > 0, x, x.new_zeros(3))
    assert waits.counts == {}
