"""What torch's tools do with masked layers: they are refused before they have done anything, or work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from tiny import assert_same_tensors, random_mask, tensors
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from fish_tuning import MaskError, apply_mask, get_mask, remove_mask

ROWS = torch.ones(2, 3)
TOOLS: dict[str, Callable[[nn.Module], Any]] = {
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", Twice()),
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": weight_norm,
    "old spectral_norm": spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "prune all": lambda layer: prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=2),
}


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("tool", TOOLS)
def test_a_masked_tensor_is_not_taken_apart(tool: str) -> None:
    layer = nn.Linear(3, 3)
    apply_mask(layer, random_mask(layer, 0.5))
    before, mask, parameters = tensors(layer), get_mask(layer), dict(layer.named_parameters())
    with pytest.raises(MaskError, match="'weight' of Linear, which has a mask"):
        TOOLS[tool](layer)
    assert_same_tensors(tensors(layer), before)
    assert_same_tensors(get_mask(layer), mask)
    assert all(layer._parameters[name] is parameters[name] for name in ("weight", "bias"))
    layer(ROWS).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    remove_mask(layer)
    TOOLS[tool](layer)
    layer(ROWS).sum().backward()


def put_away(layer: Any) -> None:
    layer.bias = None


def put_away_and_back(layer: Any) -> None:
    del layer.bias
    layer.register_parameter("bias", None)


@pytest.mark.parametrize("selected", [[False, False, False], [False, True, False]])
@pytest.mark.parametrize(
    "tool", [put_away, put_away_and_back, lambda layer: layer.register_parameter("bias", None)], ids=["=", "del", "()"]
)
def test_a_masked_tensor_is_not_put_away(tool: Callable[[nn.Module], Any], selected: list[bool]) -> None:
    layer = nn.Linear(3, 3)
    apply_mask(layer, {"bias": torch.tensor(selected)})
    expected = layer(ROWS)
    with pytest.raises(MaskError, match="'bias' of Linear has a mask, and None in its place"):
        tool(layer)
    assert torch.equal(layer(ROWS), expected)
    assert set(get_mask(layer)) == {"bias", "weight"}
    remove_mask(layer)
    tool(layer)
    assert layer.bias is None


def offloaded(layer: nn.Module) -> None:
    accelerate.cpu_offload(layer, torch.device("cpu"))
    layer(ROWS)
    accelerate.hooks.remove_hook_from_module(layer, recurse=True)


def given_whole(layer: nn.Module) -> None:
    for name in ("weight", "bias"):
        set_module_tensor_to_device(layer, name, "cpu", value=torch.ones(3, 3) if name == "weight" else torch.ones(3))


@pytest.mark.parametrize("tool", [offloaded, given_whole])
def test_whole_parameters_that_others_have_put_there_are_not_trained(tool: Callable[[nn.Module], Any]) -> None:
    layer = nn.Linear(3, 3)
    mask = random_mask(layer, 0.5)
    apply_mask(layer, mask)
    before = tensors(layer)
    tool(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(ROWS).sum().backward()
    with pytest.raises(MaskError, match=r"'(weight|bias)' of Linear has a mask, and a whole parameter .* in its place"):
        optimizer.step()
    remove_mask(layer)
    apply_mask(layer, mask)
    assert_same_tensors(tensors(layer), before)
    layer(ROWS).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert all(torch.equal(now[~mask[n]], before[n][~mask[n]]) for n, now in tensors(layer).items())


@pytest.mark.parametrize("first", ["mask", "parametrization"])
def test_a_parametrization_beside_a_mask(first: str) -> None:
    layer = nn.Linear(3, 3)
    if first == "mask":
        apply_mask(layer, {"bias": torch.tensor([True, False, True])})
    parametrize.register_parametrization(layer, "weight", Twice())
    if first == "parametrization":
        apply_mask(layer, {"bias": torch.tensor([True, False, True])})
    expected = layer(ROWS)
    remove_mask(layer)
    assert torch.equal(layer(ROWS), expected)
    assert type(layer).__name__ == "ParametrizedLinear"
    apply_mask(layer, {"bias": torch.tensor([True, False, True])})
    parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer(ROWS), expected)
    assert set(get_mask(layer)) == {"bias", "weight"}
    remove_mask(layer)
    assert type(layer) is nn.Linear
    torch.testing.assert_close(layer(ROWS), expected)


def test_what_a_parametrization_is_of_can_be_masked() -> None:
    layer: Any = parametrizations.weight_norm(nn.Linear(3, 3))
    unmasked, mask = layer(ROWS), random_mask(layer, 0.5)
    apply_mask(layer, mask)
    assert torch.equal(layer(ROWS), unmasked)
    layer(ROWS).sum().backward()
    with pytest.raises(MaskError, match="remove_mask"):
        parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer(ROWS), unmasked)
    assert_same_tensors(get_mask(layer), mask)
    remove_mask(layer)
    parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer(ROWS), unmasked)


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
def test_where_torch_swaps_parameters_masked_ones_stay() -> None:
    layer = nn.Linear(3, 3)
    apply_mask(layer, random_mask(layer, 0.5))
    new = {name: tensor + 1 for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(new)
    assert_same_tensors(tensors(layer), new)
    assert torch.equal(layer.double().weight, new["weight"].double())
    assert torch.__future__.get_swap_module_params_on_conversion()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "tool", [lambda model: torch.jit.trace(model, ROWS), torch.jit.script], ids=["trace", "script"]
)
def test_torch_script_is_refused(tool: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    apply_mask(model, random_mask(model, 0.5))
    expected = model(ROWS)
    with pytest.raises(MaskError, match=r"TorchScript .* remove_mask"):
        tool(model)
    assert torch.equal(model(ROWS), expected)
    remove_mask(model)
    assert torch.equal(tool(model)(ROWS), expected)
