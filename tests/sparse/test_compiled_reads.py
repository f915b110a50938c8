"""A compiled model computes with what its values and whole tensors are when it is called, whatever changed them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fish_tuning import apply_mask

X = torch.linspace(-1, 1, 6).view(2, 3)


class Counted:
    """A backend that counts what it compiles."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.graphs = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.graphs += 1
        return graph.forward

    def compile(self, model: Any) -> Any:
        return torch.compile(model, backend=self, fullgraph=True)  # type: ignore[arg-type]


def masked() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4))
    apply_mask(model, {"0.weight": torch.rand(4, 3) < 0.5, "0.bias": torch.tensor([True, False, True, False])})
    return model


def expected(model: Any) -> Tensor:
    """What the state dict says that the model computes."""
    state = copy.deepcopy(model).state_dict()
    return linear(X, state["0.weight"], state["0.bias"])


def by_hand(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.1)


def by_data(model: Any) -> None:
    """As weights that were averaged are put in the place of others."""
    for parameter in model.parameters():
        parameter.data.copy_(parameter.detach() * 2)


def whole(model: Any) -> None:
    with torch.no_grad():
        model[0].weight.mul_(3)


def by_a_step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).sum().backward()
    optimizer.step()


def whole_then_a_step(model: Any) -> None:
    model(X).sum().backward()
    whole(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def loaded(model: Any) -> None:
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize("change", [by_hand, by_data, whole, by_a_step, whole_then_a_step, loaded])
def test_a_change_is_seen_and_compiles_nothing_again(change: Callable[[Any], None]) -> None:
    model, counted = masked(), Counted()
    compiled = counted.compile(model)
    for _ in range(3):
        assert torch.equal(compiled(X), expected(model))
        change(model)
    assert torch.equal(compiled(X), expected(model))
    assert counted.graphs == 1


def test_what_is_thawed_has_a_gradient() -> None:
    """Another adapter that becomes the active one, or a model that is thawed layer by layer."""
    model, counted = masked(), Counted()
    model.requires_grad_(False)
    model(X)
    compiled = counted.compile(model)
    for _ in range(3):
        model.requires_grad_(True)
        compiled(X).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        model.requires_grad_(False)
        assert not compiled(X).requires_grad
        model.zero_grad()
    assert counted.graphs == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_compiled(copied: Callable[[Any], Any]) -> None:
    """Its tensors are made at the first read, which is the compiled one."""
    model: Any = copied(masked())
    compiled = Counted().compile(model)
    assert torch.equal(compiled(X), expected(model))
    compiled(X).sum().backward()
    by_hand(model)
    assert torch.equal(compiled(X), expected(model))


def test_one_graph_serves_many_layers() -> None:
    """Regional compilation; each layer's own values are looked at."""
    counted = Counted()
    layers = [masked() for _ in range(3)]
    step = counted.compile(lambda layer: layer(X))
    for layer in layers:
        step(layer)
    compiled = counted.graphs
    for layer in layers:
        by_hand(layer)
        assert torch.equal(step(layer), expected(layer))
    assert counted.graphs == compiled


def test_a_model_on_its_way_to_another_dtype() -> None:
    model, counted = masked(), Counted()
    compiled = counted.compile(model)
    compiled(X)
    model.double().float()
    by_hand(model)
    assert torch.equal(compiled(X), expected(model))
    assert counted.graphs == 1


@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_tensors_of_which_no_entry_trains(strict: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    mask = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    mask["0.weight"][1], mask["1.bias"][2] = True, True
    apply_mask(model, mask)
    by_hand(model)
    expected = model(X)
    exported = torch.export.export(model, (X,), strict=strict).module()
    assert torch.equal(exported(X), expected)
