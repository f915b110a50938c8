"""Which parameters a loss may depend on, by its graph."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fish_tuning.scores.plain_gradients import reached


def test_parameters_that_a_loss_leads_to() -> None:
    used, other = nn.Linear(3, 3), nn.Linear(3, 3)
    parameters = {f"{name}.{local}": each for name, module in (("used", used), ("other", other))
                  for local, each in module.named_parameters()}  # fmt: skip
    x = torch.randn(2, 3)
    assert set(reached(used(x).sum(), parameters)) == {"used.weight", "used.bias"}
    assert set(reached((used(x) + other(x).detach()).sum(), parameters)) == {"used.weight", "used.bias"}
    assert set(reached(checkpoint(other, used(x), use_reentrant=False).sum(), parameters)) == set(parameters)
    assert reached(used(x).sum(), {"other.weight": other.weight}) == {}
    assert reached(used.weight, parameters) == {}  # a parameter itself has no graph; no loss is one
