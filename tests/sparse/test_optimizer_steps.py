"""What is done around an optimizer's step is done for the masked values that it holds then, whatever it held before."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from device import placed
from torch import nn

from fish_tuning import MaskError, apply_mask, remove_mask, replace_mask
from fish_tuning.sparse import optimizer_steps
from fish_tuning.sparse.masked_tensors import masked_tensors


def every_second(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: torch.arange(p.numel(), device=p.device).view(p.shape) % 2 == 0 for n, p in model.named_parameters()}


def masked() -> nn.Sequential:
    model = placed(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    apply_mask(model, every_second(model))
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def written(model: nn.Module) -> bool:
    """Whether the memory that compiled models read, without looking whether it is out of date, holds the values."""
    every: list[Any] = [each.masked for each in masked_tensors(model)]
    return all(torch.equal(m.frozen.flatten()[m.index.long()], m.values.detach().flatten()) for m in every)


def test_an_optimizer_that_gets_other_parameters_writes_them() -> None:
    model = masked()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters[:2], lr=1.0)
    step(model, optimizer)
    assert written(model)
    optimizer.add_param_group({"params": parameters[2:]})
    step(model, optimizer)
    assert written(model)
    optimizer.param_groups[0]["params"] = parameters[1:2]  # as many groups, one parameter fewer
    step(model, optimizer)
    optimizer.param_groups[0]["params"] = parameters[:1]  # as many parameters, others
    step(model, optimizer)
    assert written(model)


def test_parameters_that_are_masked_after_a_step_are_found() -> None:
    """Another model's values take the places of an optimizer's parameters, which are then put into its groups."""
    model = placed(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step(model, optimizer)
    apply_mask(model, every_second(model))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    step(model, optimizer)
    assert written(model)
    remove_mask(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    before = model[0].weight.detach().clone()
    step(model, optimizer)
    assert torch.equal(model[0].weight, before - 1)


def test_an_optimizer_that_was_made_before_the_mask_is_refused() -> None:
    """It would train nothing of what is masked, without a word."""
    model = placed(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    apply_mask(model, {"0.weight": every_second(model)["0.weight"]})
    with pytest.raises(MaskError, match=r"SGD was made before apply_mask: of a tensor of shape \(4, 3\)"):
        optimizer.step()
    optimizer.add_param_group({"params": [model._modules["0"]._parameters["weight"]]})
    step(model, optimizer)
    assert written(model)


def test_an_optimizer_that_was_made_before_the_mask_went_is_refused() -> None:
    model = masked()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    remove_mask(model)
    with pytest.raises(MaskError, match="SGD was made before remove_mask"):
        optimizer.step()
    step(model, torch.optim.SGD(model.parameters(), lr=1.0))
    mask = every_second(model)
    apply_mask(model, mask)
    with pytest.raises(MaskError, match="SGD was made before"):
        optimizer.step()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    replace_mask(model, {name: ~selected for name, selected in mask.items()}, optimizer)
    step(model, optimizer)
    assert written(model)


def test_what_does_not_train_now_may_be_held() -> None:
    model = placed(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    apply_mask(model, {"0.weight": every_second(model)["0.weight"], "0.bias": torch.zeros_like(model[0].bias).bool()})
    model[0].requires_grad_(False)
    optimizer.step()


def test_values_that_come_first_and_are_read_later_are_found() -> None:
    model = masked()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step(model, optimizer)
    model.half().float()  # new groups' tensors for the same parameters
    step(model, optimizer)
    assert written(model)


def test_an_optimizer_is_not_kept_for_what_is_known_of_it() -> None:
    model = masked()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step(model, optimizer)
    gone, values = weakref.ref(optimizer), weakref.ref(next(model.parameters()))
    assert optimizer in optimizer_steps._trained
    del optimizer, model
    gc.collect()
    assert gone() is None
    assert values() is None
