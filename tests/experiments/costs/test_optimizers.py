"""What optimizers keep, against optimizers that have stepped."""

from __future__ import annotations

import pytest
import torch
from transformers.training_args import OptimizerNames

from fish_tuning.experiments.costs.optimizers import Trained, optimizer_state, step_bytes
from fish_tuning.experiments.run.measure import optimizer_state_bytes

SHAPES = [(10, 1), (7,), (5, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("optim", "make", "known"),
    [
        ("adamw_torch", torch.optim.AdamW, True),
        ("adamw_torch_fused", lambda values: torch.optim.AdamW(values, fused=True), True),
        ("sgd", torch.optim.SGD, False),
        ("adagrad", torch.optim.Adagrad, False),
        ("rmsprop", torch.optim.RMSprop, False),
    ],
)
def test_state(optim: str, make: object, known: bool, dtype: torch.dtype) -> None:
    values = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    optimizer = make(values)  # type: ignore[operator]
    for each in values:
        each.grad = torch.ones_like(each)
    optimizer.step()
    said = optimizer_state(optim, [Trained(each.numel(), dtype) for each in values])
    kept = [each for state in optimizer.state.values() for each in state.values() if isinstance(each, torch.Tensor)]
    assert said.nbytes == optimizer_state_bytes(optimizer)
    assert said.tensors == len(kept)
    assert (said.assumed is None) == known


@pytest.mark.parametrize("optim", [name.value for name in OptimizerNames])
def test_none_is_refused(optim: str) -> None:
    trained = [Trained(5000, torch.float32), Trained(0, torch.float32)]
    said = optimizer_state(optim, trained)
    assert 0 <= said.nbytes <= 3 * 20000 + 8
    assert said.assumed is None or f"optim={optim}" in said.assumed
    assert 0 <= step_bytes(optim, trained, gpu=True) <= 20000


def test_8_bits_are_less_where_tensors_are_large() -> None:
    large, small = [Trained(2**20, torch.float32)], [Trained(1000, torch.float32)]
    assert optimizer_state("adamw_8bit", large).nbytes == 2 * (2**20 + 4 * 2**12)
    assert optimizer_state("adamw_8bit", small).nbytes == 8000


def test_what_a_step_makes() -> None:
    trained = [Trained(10, torch.float32), Trained(30, torch.float32)]
    assert step_bytes("adamw_torch_fused", trained, gpu=True) == 0
    assert step_bytes("adamw_torch", trained, gpu=True) == 160
    assert step_bytes("adamw_torch", trained, gpu=False) == 120
    assert step_bytes("adamw_torch", [], gpu=True) == 0
