"""Copies and pickles of masked modules: what their own classes say of them is heard."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import assert_only_selected_moved, random_mask, tensors
from torch import Tensor, nn

from fish_tuning import MaskError, apply_mask, get_mask, remove_mask


class Locked(nn.Module):
    """Has what cannot be copied, and makes it again."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.own = (each for each in ())

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.weight

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.own = (each for each in ())


class Remade(Locked):
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (), self.__getstate__()


class ByItsNumbers(Locked):
    """Without a word of what else there is."""

    def __getstate__(self) -> dict[str, Any]:
        return {"weight": self.weight.detach()}


class Traced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, rows):  # type: ignore[no-untyped-def]  # torch.fx could not pickle annotations that are strings
        return self.linear(rows) @ self.weight


def masked(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    mask = random_mask(model, 0.5)
    apply_mask(model, mask)
    return model, mask


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def outputs(model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    given = model(torch.randn(2, 4, 3))
    return given[0] if isinstance(given, tuple) else given  # type: ignore[no-any-return]


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "own __getstate__": Locked,
    "own __reduce__": Remade,
    "LSTM": lambda: nn.LSTM(3, 4, num_layers=2),
    "traced": lambda: torch.fx.symbolic_trace(Traced()),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("make", MODELS)
def test_a_copy_is_a_masked_model_of_its_own(make: str, way: str) -> None:
    model, mask = masked(MODELS[make]())
    before, expected = tensors(model), outputs(model)
    copied = COPIES[way](model)
    assert torch.equal(outputs(copied), expected)
    assert all(torch.equal(selected, mask[name]) for name, selected in get_mask(copied).items())
    optimizer = torch.optim.SGD(copied.parameters(), lr=1.0)
    outputs(copied).square().sum().backward()
    optimizer.step()
    assert_only_selected_moved(before, tensors(copied), mask)
    assert torch.equal(outputs(model), expected)
    assert not torch.equal(outputs(copied), expected)
    again = MODELS[make]()
    again.load_state_dict(copied.state_dict())
    torch.testing.assert_close(outputs(again), outputs(copied))
    copied.load_state_dict(before)
    assert torch.equal(outputs(copied), expected)
    remove_mask(copied)
    again.load_state_dict(copied.state_dict())
    assert torch.equal(outputs(again), expected)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_layers_that_are_compiled_in_place_are_copied_without_what_is_compiled(way: str) -> None:
    """It is of the original's tensors, which the copy would compute with and train."""
    model, _ = masked(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    for layer in model.children():
        layer.compile(backend="eager")
    expected = outputs(model)
    copied = COPIES[way](model)
    outputs(copied).sum().backward()
    assert all(parameter.grad is not None for parameter in copied.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(outputs(model), expected)


def test_a_traced_model_is_compiled_again() -> None:
    model: Any = masked(torch.fx.symbolic_trace(Traced()))[0]
    expected = outputs(model)
    model.recompile()
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("way", COPIES)
def test_what_leaves_the_masks_out_is_refused(way: str) -> None:
    model, _ = masked(ByItsNumbers())
    with pytest.raises(MaskError, match="ByItsNumbers copies and pickles its modules"):
        COPIES[way](model)


def test_a_whole_tensor_is_copied_as_the_parameter_that_it_stands_for() -> None:
    model, _ = masked(nn.Sequential(nn.Linear(3, 3)))
    weight: Any = model[0].weight  # type: ignore[index]
    for way in ("deepcopy", "pickle"):
        copied = COPIES[way]([weight, weight])
        assert type(copied[0]) is nn.Parameter
        assert copied[0] is copied[1]
        assert copied[0].is_leaf
        assert copied[0].requires_grad
        assert torch.equal(copied[0], weight)
        assert copied[0].data_ptr() != weight.data_ptr()
