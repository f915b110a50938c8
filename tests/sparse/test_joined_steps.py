"""Steps of values that are stepped as one tensor are those of each by itself, whatever happens between them."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from device import DEVICE, placed
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fish_tuning import MaskError, apply_mask, replace_mask
from fish_tuning.sparse import joined_steps
from fish_tuning.sparse.masked_tensors import masked_tensors

WAYS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda parameters: AdamW(parameters, lr=0.02, weight_decay=0.1),
    "AdamW, fused": lambda parameters: AdamW(parameters, lr=0.02, fused=True),
    "AdamW, foreach, amsgrad": lambda parameters: AdamW(parameters, lr=0.02, foreach=True, amsgrad=True),
    "AdamW, lr as a tensor": lambda parameters: AdamW(parameters, lr=torch.tensor(0.02)),
    "Adam": lambda parameters: Adam(parameters, lr=0.02, weight_decay=0.1, maximize=True),
    "SGD": lambda parameters: SGD(parameters, lr=0.5),
    "SGD, momentum": lambda parameters: SGD(
        parameters, lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=False
    ),
}


class Side:
    """A masked model and its optimizer, whose steps are joined or not."""

    def __init__(self, make: Callable[[Any], Optimizer], joins: bool) -> None:
        torch.manual_seed(0)
        self.model: Any = placed(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2), nn.LayerNorm(2)))
        apply_mask(self.model, every_third(self.model, 0))
        self.make, self.joins, self.number = make, joins, 0
        self.optimizer = make(self.model.parameters())

    def values(self) -> list[Any]:
        return list(self.model.parameters())

    def step(self, without: int | None = None, **kwargs: Any) -> int:
        """One step with random gradients; how many tensors' were stepped as one."""
        self.number += 1
        draw = torch.Generator().manual_seed(self.number)
        for place, values in enumerate(self.values()):
            grad = torch.randn(values.shape, generator=draw).to(values)
            values.grad = None if place == without or not values.requires_grad else grad
        return self.only_step(**kwargs)

    def only_step(self, **kwargs: Any) -> int:
        joined: list[int] = []

        def stepper(steps: Any, optimizer: Optimizer) -> Optimizer | None:
            made = ORIGINAL(steps, optimizer) if self.joins else None
            wholes = [] if made is None else vars(made)[joined_steps._WHOLES]
            joined.append(sum(len(whole.joined.values) for whole in wholes))
            return made

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(joined_steps.JoinedSteps, "stepper", stepper)
            self.optimizer.step(**kwargs)
        return sum(joined)


ORIGINAL = joined_steps.JoinedSteps.stepper


def every_third(model: nn.Module, first: int) -> dict[str, Tensor]:
    return {
        name: (torch.arange(tensor.numel(), device=tensor.device) % 3 == first).view(tensor.shape)
        for name, tensor in model.state_dict().items()
    }


def both(way: str) -> tuple[Side, Side]:
    return Side(WAYS[way], joins=True), Side(WAYS[way], joins=False)


def assert_equal(one: Side, other: Side) -> None:
    # A fused kernel rounds the last entries of a tensor otherwise than the others.
    rounding = {"rtol": 0, "atol": 1e-6} if one.optimizer.defaults.get("fused") else {"rtol": 0, "atol": 0}
    for ours, theirs in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, **rounding)
    ours, theirs = one.optimizer.state_dict(), other.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for place, state in theirs["state"].items():
        assert ours["state"][place].keys() == state.keys()
        for key, value in state.items():
            mine = ours["state"][place][key]
            if isinstance(value, Tensor):
                torch.testing.assert_close(mine, value, **rounding)
            else:
                assert mine == value
    for mine, each in zip(one.values(), other.values(), strict=True):
        assert (mine.grad is None) == (each.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, each.grad)
    for tensor in masked_tensors(one.model):  # what compiled models read
        masked: Any = tensor.masked
        assert torch.equal(masked.frozen.flatten()[masked.index.long()], masked.values.detach().flatten())


@pytest.mark.parametrize("way", WAYS)
def test_joined_steps_are_those_of_each(way: str) -> None:
    one, other = both(way)
    for number in range(4):
        joined = number > 0 or way == "SGD"  # the first makes the states
        assert one.step() == (len(one.values()) if joined else 0)
        assert other.step() == 0
        assert_equal(one, other)


def reload(side: Side) -> None:
    stored = io.BytesIO()
    torch.save(side.optimizer.state_dict(), stored)
    stored.seek(0)
    side.optimizer = side.make(side.model.parameters())
    side.optimizer.load_state_dict(torch.load(stored, weights_only=True))


def copied(side: Side) -> None:
    side.model, side.optimizer = copy.deepcopy((side.model, side.optimizer))


def reset_one(side: Side) -> None:
    side.optimizer.state[side.values()[1]] = {}


def reset_entries(side: Side) -> None:
    for state in side.optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                state[key] = torch.ones_like(value)
                break


def reset_in_place(side: Side) -> None:
    for value in side.optimizer.state[side.values()[2]].values():
        if isinstance(value, Tensor) and value.dim():
            value.zero_()


def count_one_higher(side: Side) -> None:
    if "step" in side.optimizer.state[side.values()[0]]:
        side.optimizer.state[side.values()[0]]["step"].add_(5)


def forget(side: Side) -> None:
    side.optimizer.state.clear()


def other_rate(side: Side) -> None:
    side.optimizer.param_groups[0]["lr"] = 0.01


def two_param_groups(side: Side) -> None:
    held = side.optimizer.param_groups
    held.append({**held[0], "params": held[0]["params"][3:], "lr": 0.001})
    held[0]["params"] = held[0]["params"][:3]


def write_data(side: Side) -> None:
    side.values()[0].data = side.values()[0].data + 1


def write_values(side: Side) -> None:
    with torch.no_grad():
        side.values()[0].mul_(2)


def write_whole(side: Side) -> None:
    with torch.no_grad():
        side.model[0].weight.mul_(2)


def freeze_one(side: Side) -> None:
    side.values()[0].requires_grad_(False)


def other_mask(side: Side) -> None:
    replace_mask(side.model, every_third(side.model, 1), side.optimizer)


def other_dtype(side: Side) -> None:
    side.model.double()
    side.optimizer = side.make(side.model.parameters())


def elsewhere(side: Side) -> None:
    """As states are offloaded."""
    for state in side.optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


def one_elsewhere(side: Side) -> None:
    state = side.optimizer.state[side.values()[1]]
    key = next(key for key, value in state.items() if value.dim())
    state[key].data = torch.ones_like(state[key])


def other_count(side: Side) -> None:
    for state in side.optimizer.state.values():
        if "step" in state:
            state["step"].fill_(7)


def settings(side: Side) -> None:
    side.optimizer.param_groups[0].update(weight_decay=0.3, maximize=True)


def new_parameter(side: Side) -> None:
    """Which gets its first state in a step whose others are joined."""
    parameter = nn.Parameter(torch.ones(3, device=DEVICE))
    parameter.grad = torch.ones_like(parameter)
    side.optimizer.add_param_group({"params": [parameter], "lr": 0.1})


EVENTS = [
    elsewhere, one_elsewhere, other_count, settings, reload, copied, reset_one, reset_entries, reset_in_place,
    count_one_higher, forget, other_rate, two_param_groups, write_data, write_values, write_whole, freeze_one,
    other_mask, other_dtype, new_parameter,
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("way", ["AdamW", "AdamW, fused", "SGD, momentum"])
def test_what_happens_between_two_steps_counts(way: str, event: Callable[[Side], None]) -> None:
    one, other = both(way)
    for side in (one, other):
        side.step()
        side.step()
        event(side)
        side.step()
    assert_equal(one, other)
    for side in (one, other):
        side.step()
        side.step()
    assert_equal(one, other)


@pytest.mark.parametrize("way", ["AdamW", "AdamW, fused", "SGD, momentum"])
def test_where_a_tensor_has_no_gradient_each_is_stepped_by_itself(way: str) -> None:
    one, other = both(way)
    hidden = [[side.step(without) for without in (None, 3, None, None, 2, None, 3)] for side in (one, other)]
    assert_equal(one, other)
    assert 0 < hidden[0][1] < len(one.values())  # the matrices are a group, the vectors another
    assert not any(hidden[1])


def test_after_steps_one_by_one_they_are_joined_again() -> None:
    one, other = both("AdamW")
    for side in (one, other):
        side.step()
        side.step(closure=lambda: 0.0)  # each by itself
        assert side.step() == (len(side.values()) if side.joins else 0)
    assert_equal(one, other)


def test_who_moves_states_again_and_again_has_them_stepped_one_by_one() -> None:
    one, other = both("AdamW")
    hidden: list[list[int]] = [[], []]
    for side, found in zip((one, other), hidden, strict=True):
        for _ in range(5):
            found += [side.step(), side.step()]
            elsewhere(side)
    assert [number > 0 for number in hidden[0]] == [False, True, False, True, False, True] + [False] * 4
    assert_equal(one, other)


def test_gradients_of_a_closure_are_found() -> None:
    one, other = both("AdamW")
    for side in (one, other):
        inputs = torch.ones(2, 3, device=DEVICE)

        def closure(side: Side = side, inputs: Tensor = inputs) -> Tensor:
            side.optimizer.zero_grad()
            loss: Tensor = side.model(inputs).square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            assert side.only_step(closure=closure) == 0
    assert_equal(one, other)


def test_states_stay_the_objects_that_they_are_in_the_order_of_the_parameters() -> None:
    side = Side(WAYS["AdamW"], joins=True)
    plain = AdamW([nn.Parameter(values.detach().clone()) for values in side.values()])
    for values, parameter in zip(side.values(), plain.param_groups[0]["params"], strict=True):
        values.grad, parameter.grad = torch.ones_like(values), torch.ones_like(parameter)
    held: list[Any] = []
    side.optimizer.register_step_post_hook(lambda *_: held.append(side.optimizer.state_dict()["state"]))
    side.only_step()
    plain.step()
    side.optimizer._optimizer_step_post_hooks.clear()
    for _ in range(3):
        side.step()
    assert list(held[0]) == list(side.optimizer.state_dict()["state"]) == list(plain.state_dict()["state"])
    for place, state in side.optimizer.state_dict()["state"].items():
        assert list(state) == list(plain.state_dict()["state"][place])
        assert all(held[0][place][key] is value for key, value in state.items())


def test_states_that_nobody_holds_are_gone() -> None:
    side = Side(WAYS["AdamW"], joins=True)
    for _ in range(3):
        side.step()
    states = [weakref.ref(state["exp_avg"].untyped_storage()) for state in side.optimizer.state.values()]
    side.optimizer.state.clear()
    gc.collect()
    assert not any(state() is not None for state in states)


def test_gradients_in_one_memory_and_by_themselves() -> None:
    """From a backward pass they are slices of one memory; accumulated, clipped and scaled they still are."""
    one, other = both("AdamW")
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    scalers = [torch.amp.GradScaler(DEVICE.type, init_scale=8.0) for _ in range(2)]
    for side, scaler in zip((one, other), scalers, strict=True):
        for number in range(4):
            for _ in range(2):
                scaler.scale(side.model(inputs)[:, 0].sum()).backward()
            scaler.unscale_(side.optimizer)
            torch.nn.utils.clip_grad_norm_(side.model.parameters(), 0.5)
            if number == 2:
                side.values()[0].grad = side.values()[0].grad.clone()
            side.only_step()
            scaler.update()
            side.optimizer.zero_grad(set_to_none=number < 2)
    assert_equal(one, other)


@pytest.mark.parametrize("inf", [False, True])
def test_a_grad_scaler_tells_fused_optimizers(inf: bool) -> None:
    one, other = both("AdamW, fused")
    for side in (one, other):
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=8.0)
        inputs = torch.full((4, 3), torch.inf if inf else 1.0, device=DEVICE)
        for _ in range(3):
            scaler.scale(side.model(inputs)[:, 0].sum()).backward()
            scaler.step(side.optimizer)
            scaler.update()
            side.optimizer.zero_grad()
        side.step()
    assert_equal(one, other)


@pytest.mark.parametrize("registered", ["pre", "post"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_who_looks_into_a_step_finds_the_gradients(registered: str, everywhere: bool) -> None:
    side, seen = Side(WAYS["AdamW"], joins=True), []
    side.step()

    def look(optimizer: Optimizer, *_: Any) -> None:
        assert optimizer is side.optimizer
        seen.append(side.values()[0].grad)

    where: Any = import_module("torch.optim.optimizer") if everywhere else side.optimizer
    prefix = "register_optimizer_step" if everywhere else "register_step"
    handle = getattr(where, f"{prefix}_{registered}_hook")(look)
    try:
        assert side.step() == 0
    finally:
        handle.remove()
    assert len(seen) == 1
    assert seen[0] is side.values()[0].grad is not None
    assert side.step() == len(side.values())


def fail_in_a_step(side: Side) -> None:
    """In a param group that others follow."""
    wrong = nn.Parameter(torch.ones(2, device=DEVICE))
    wrong.grad = torch.ones_like(wrong)
    side.optimizer.param_groups.insert(0, {**side.optimizer.param_groups[0], "params": [wrong], "lr": "wrong"})
    with pytest.raises((TypeError, RuntimeError)):
        side.step()
    side.optimizer.state.pop(wrong, None)
    side.optimizer.param_groups.pop(0)


def and_restore_in_place(side: Side) -> None:
    """As torch.distributed.checkpoint loads."""
    held = [(value, value.clone()) for state in side.optimizer.state.values() for value in state.values()]
    fail_in_a_step(side)
    for value, before in held:
        value.copy_(before)


def and_forget(side: Side) -> None:
    fail_in_a_step(side)
    side.optimizer.state.clear()


@pytest.mark.parametrize("way", ["AdamW", "AdamW, fused", "SGD, momentum"])
@pytest.mark.parametrize("what", [fail_in_a_step, and_restore_in_place, and_forget])
def test_an_error_within_a_step_moves_nothing_and_leaves_gradients(way: str, what: Callable[[Side], None]) -> None:
    one, other = both(way)
    for side in (one, other):
        side.step()
        side.step()
        what(side)
        assert all(values.grad is not None for values in side.values())
        side.step()
        side.step()
    assert_equal(one, other)


def test_an_error_in_a_later_param_group_moves_nothing_of_what_is_joined() -> None:
    side = Side(WAYS["AdamW"], joins=True)
    side.step()
    held = side.optimizer.param_groups
    held.append({**held[0], "params": [nn.Parameter(torch.ones(2, device=DEVICE))], "lr": "wrong"})
    held[1]["params"][0].grad = torch.ones(2, device=DEVICE)
    before = [values.detach().clone() for values in side.values()]
    with pytest.raises(TypeError):
        side.step()
    assert all(torch.equal(values, old) for values, old in zip(side.values(), before, strict=True))
    held.pop()
    assert side.step() == len(side.values())
    assert not any(torch.equal(values, old) for values, old in zip(side.values(), before, strict=True))
    assert {float(side.optimizer.state[values]["step"]) for values in side.values()} == {2.0}


def patch_step(optimizer: Any) -> None:
    original = optimizer.step
    optimizer.step = lambda *args, **kwargs: original(*args, **kwargs)


def test_nothing_of_a_step_with_an_error_is_kept() -> None:
    """Though its step is patched with a function that knows it, as accelerate's is."""
    side = Side(WAYS["AdamW"], joins=True)
    patch_step(side.optimizer)
    for _ in range(2):
        side.step()
    fail_in_a_step(side)
    grads = [weakref.ref(values.grad.untyped_storage()) for values in side.values()]
    side.optimizer.zero_grad()
    gc.collect()
    assert not any(grad() is not None for grad in grads)
    gone = weakref.ref(side.optimizer)
    del side
    gc.collect()
    assert gone() is None


def test_states_of_other_counts_that_are_loaded_again_are_seen() -> None:
    """Tensors that were just loaded have changed as often as others that were."""
    one, other = both("AdamW")
    for side in (one, other):
        side.step()
        side.step()
        equal = copy.deepcopy(side.optimizer.state_dict())
        side.step(without=2)
        unequal = copy.deepcopy(side.optimizer.state_dict())
        for states in (equal, unequal):
            side.optimizer.load_state_dict(states)
            side.step()
    assert_equal(one, other)


@pytest.mark.parametrize("kind", ["expanded", "every second", "of another dtype"])
def test_gradients_that_only_begin_where_slices_would(kind: str) -> None:
    if kind == "of another dtype" and not hasattr(Tensor, "grad_dtype"):
        pytest.skip("torch has no gradients of another dtype than their tensor's")
    one, other = both("SGD")
    for side in (one, other):
        side.step()
        matrices = [values for values in side.values() if values.dim() > 1]
        draw = torch.Generator().manual_seed(9)
        memory = torch.randn(1000, generator=draw).to(DEVICE)
        if kind == "of another dtype":
            memory = memory.double()
        start = 0
        for values in matrices:
            number, last = len(values), values is matrices[-1]
            values.grad_dtype = None
            if kind == "of another dtype" or not last:
                values.grad = memory[start : start + number].view(-1, 1)
            elif kind == "expanded":
                values.grad = memory[start : start + 1].expand(number, 1)
            else:
                values.grad = memory[start::2][:number].view(-1, 1)
            start += number
        side.only_step()
    assert_equal(one, other)


def test_sparse_gradients_of_values_are_refused() -> None:
    side = Side(WAYS["SGD"], joins=True)
    side.step()
    for values in side.values():
        values.grad = values.grad.to_sparse()
    with pytest.raises(MaskError, match=r"Set a dense one: gradient\.to_dense\(\)"):
        side.only_step()


def test_fused_sgd_in_16_bits_is_not_joined() -> None:
    """On a CPU torch computes it wrongly where there are many entries."""
    one, other = (Side(lambda parameters: SGD(parameters, lr=0.5, fused=True), joins) for joins in (True, False))
    for side in (one, other):
        side.model.bfloat16()
        assert side.step() == side.step() == 0
    assert_equal(one, other)


def test_nesterovs_foreach_writes_into_gradients_that_are_copied_for_no_step() -> None:
    one, other = (
        Side(lambda parameters: SGD(parameters, lr=0.5, momentum=0.9, nesterov=True, foreach=True), joins)
        for joins in (True, False)
    )
    for side in (one, other):
        for _ in range(3):
            side.step()  # of gradients that lie anywhere
    assert_equal(one, other)


def test_states_that_an_optimizer_makes_beside_others_are_handed_back() -> None:
    one, other = both("SGD")
    for side in (one, other):
        for values in side.values():
            side.optimizer.state[values]["average"] = values.detach().clone()
        for _ in range(3):
            side.step()
        side.optimizer.param_groups[0]["momentum"] = 0.9
        for _ in range(4):
            side.step()
        assert all("momentum_buffer" in state for state in side.optimizer.state.values())
    assert_equal(one, other)


def test_a_parameter_that_is_there_twice_is_stepped_twice() -> None:
    one, other = both("SGD")
    for side in (one, other):
        side.optimizer.param_groups[0]["params"].append(side.values()[0])
        assert side.step() == 0
    assert_equal(one, other)


def test_in_inference_mode_each_is_stepped_by_itself() -> None:
    one, other = both("AdamW")
    for side in (one, other):
        with torch.inference_mode():
            side.step()
            side.step()
    assert_equal(one, other)


def test_subclasses_are_left_alone() -> None:
    class Doubled(AdamW):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            for held in self.param_groups:
                for parameter in held["params"]:
                    parameter.data.add_(1)

    one, other = (Side(Doubled, joins) for joins in (True, False))
    for side in (one, other):
        AdamW(side.model.parameters())  # torch puts its hooks on the step of a class when it makes the first
        for _ in range(3):
            assert side.step() == 0
    assert_equal(one, other)


def test_nothing_of_a_step_is_kept() -> None:
    side = Side(WAYS["AdamW"], joins=True)
    for _ in range(2):
        side.step()
    grads = [weakref.ref(values.grad) for values in side.values()]
    side.optimizer.zero_grad()
    assert not any(grad() is not None for grad in grads)


def test_compiled_steps_are_those_of_each() -> None:
    """In a graph for all tensors, made once; and the same where torch gives up compiling."""
    one, other = both("SGD, momentum")
    graphs: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda: one.optimizer.step(), backend=count)
    for number in range(5):
        other.step()
        for ours, theirs in zip(one.values(), other.values(), strict=True):
            ours.grad = theirs.grad.clone()
        with torch._dynamo.config.patch(disable=number == 4):
            compiled()
        assert_equal(one, other)
    assert len(graphs) <= 2
