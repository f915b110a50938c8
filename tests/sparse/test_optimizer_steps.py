"""What is done around an optimizer's step is done for the masked values that it holds then, whatever it held before."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from device import DEVICE, placed
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fish_tuning import FishTuningWarning, MaskError, apply_mask, get_mask, remove_mask, replace_mask
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


def test_a_step_counts_after_the_whole_tensor_was_written_into() -> None:
    """Projected steps: the tensor is clamped between the backward pass and the step."""
    model = masked()
    before, selected = model[0].weight.detach().clone(), get_mask(model)["0.weight"]
    with torch.no_grad():
        model[0].weight.clamp_(-9, 9)  # changes no number
    step(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert torch.equal(model[0].weight, before - selected.float())


def test_what_a_closure_writes_into_the_whole_tensor_is_stepped_from() -> None:
    model = masked()
    before, selected = model[0].weight.detach().clone(), get_mask(model)["0.weight"]

    def closure() -> float:
        with torch.no_grad():
            model[0].weight.add_(1)
        model[0]._parameters["weight"].grad = torch.ones_like(model[0]._parameters["weight"])  # type: ignore[arg-type]
        return 0.0

    torch.optim.SGD([model[0]._parameters["weight"]], lr=3.0).step(closure)  # type: ignore[list-item]
    assert torch.equal(model[0].weight, torch.where(selected, before + 1 - 3, before + 1))


def clipping_classes() -> tuple[type[Any], type[Any]]:
    """A class whose steps torch has not put hooks around yet, and one that clips a layer's weight after its steps."""

    class Below(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> Any:
            for parameter in self.param_groups[0]["params"]:
                parameter.detach().sub_(parameter.grad)

    class Clipping(Below):
        clipped: Any = None

        def step(self, closure: Any = None) -> Any:
            super().step()
            clip(self.clipped)

    return Below, Clipping


def clip(layer: Any) -> None:
    with torch.no_grad():
        layer.weight.clamp_(-0.2, 0.2)


@pytest.mark.parametrize("kind", ["subclass", "nested", "after", "before", "all before", "closure", "lbfgs"])
def test_weights_that_are_clipped_within_a_step_are_those_of_the_unmasked_model(kind: str) -> None:
    torch.manual_seed(0)
    dense = placed(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))).double()
    x = torch.randn(5, 3, dtype=torch.double, device=DEVICE)
    mask = every_second(dense)
    below, clipping = clipping_classes()
    if kind == "nested":
        below(dense.parameters(), {})  # has torch call the hooks in the step of the class below, too
    results = []
    for masks in (False, True):
        model: Any = copy.deepcopy(dense)
        if masks:
            apply_mask(model, mask)
        made: Any = {"subclass": clipping, "nested": clipping, "lbfgs": torch.optim.LBFGS}.get(kind, torch.optim.SGD)
        optimizer = made(model.parameters(), {"lr": 0.5} if made is clipping else 0.5)
        optimizer.clipped = model[0]
        hook = None
        if kind == "after":
            hook = optimizer.register_step_post_hook(lambda *_, layer=model[0]: clip(layer))
        elif kind == "before":
            hook = optimizer.register_step_pre_hook(lambda *_, layer=model[0]: clip(layer))
        elif kind == "all before":
            hook = register_optimizer_step_pre_hook(lambda *_, layer=model[0]: clip(layer))

        def gradients(model: Any = model, optimizer: Any = optimizer, masks: bool = masks) -> Any:
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            if kind in ("closure", "lbfgs"):
                clip(model[0])
            for name, parameter in () if masks else model.named_parameters():
                parameter.grad.mul_(mask[name])
            return loss

        for _ in range(3):
            if kind in ("closure", "lbfgs"):
                optimizer.step(gradients)
            else:
                gradients()
                optimizer.step()
        if hook is not None:
            hook.remove()
        assert not optimizer._optimizer_step_pre_hooks
        results.append([model[0].weight.detach(), model[1].weight.detach()])
    torch.testing.assert_close(*results, rtol=0, atol=1e-9 if kind == "lbfgs" else 0)  # which adds up in other orders


@pytest.mark.parametrize("closed", [False, True])
def test_an_optimizer_may_give_its_parameters_other_memory(closed: bool) -> None:
    class Assigning(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> Any:
            if closure is not None:
                closure()
            for parameter in self.param_groups[0]["params"]:
                parameter.data = parameter.data - parameter.grad

    model = masked()
    mask = get_mask(model)
    expected = {name: tensor - mask[name].float() for name, tensor in model.state_dict().items()}

    def closure() -> None:
        model(torch.ones(1, 3, device=DEVICE))

    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    Assigning(model.parameters(), {}).step(closure if closed else None)
    assert written(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_write_that_a_step_cannot_take_is_told() -> None:
    """A class clips before it steps, of which nothing tells."""

    class ClippingFirst(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> Any:
            clip(model[0])
            for parameter in self.param_groups[0]["params"]:
                parameter.detach().sub_(parameter.grad)

    model = masked()
    optimizer = ClippingFirst(model.parameters(), {})
    with pytest.warns(FishTuningWarning, match="Within an optimizer's step somebody has written into a masked tensor"):
        step(model, optimizer)
    assert written(model)


def test_an_embedding_with_a_largest_norm_trains() -> None:
    """It makes its rows shorter in each forward pass, in place."""
    torch.manual_seed(0)
    results = []
    dense = placed(nn.Embedding(4, 3, max_norm=1.0))
    selected = torch.arange(12, device=dense.weight.device).view(4, 3) % 2 == 0
    for masks in (False, True):
        model: Any = copy.deepcopy(dense)
        if masks:
            apply_mask(model, {"weight": selected})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            model(torch.tensor([1, 2], device=selected.device)).square().sum().backward()
            if not masks:
                model.weight.grad.mul_(selected)
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.weight.detach())
    torch.testing.assert_close(*results)


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
