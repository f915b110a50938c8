"""Whatever is done to values and whole tensors, in whatever order, reads give what dense bookkeeping gives."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from fish_tuning import MaskError, apply_mask, get_mask
from fish_tuning.sparse.groups import Group
from fish_tuning.sparse.masked_tensors import masked_tensors, unmask_tensor


class Bookkept:
    """A masked model beside the dense tensors that it should have."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.choose = random.Random(seed)
        self.model: Any = nn.Sequential(*[nn.Linear(3, 4) for _ in range(3)], nn.Linear(4, 300))
        mask = {name: torch.rand(p.shape) < 0.4 for name, p in self.model.named_parameters()}
        mask["1.weight"][:] = False  # a tensor without values, among the others
        mask["2.bias"][:] = True  # and a dense one
        apply_mask(self.model, mask)
        self.dense = {t.name: t.masked.dense_of(t.masked.values) for t in self.tensors() if t.masked.values is not None}
        self.held: dict[str, Tensor] = {name: self.read(name) for name in self.dense}
        self.mask = get_mask(self.model)

    def tensors(self) -> list[Any]:
        return list(masked_tensors(self.model))

    def values(self, name: str) -> Any:
        return dict(self.model.named_parameters())[name]

    def read(self, name: str) -> Tensor:
        path, _, local = name.rpartition(".")
        read: Tensor = getattr(self.model.get_submodule(path), local)
        return read

    def set_entries(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        entries = self.dense[name][self.mask[name]]
        self.dense[name][self.mask[name]] = change(entries)

    def check(self, names: list[str]) -> None:
        for name in names:
            path, _, local = name.rpartition(".")
            layer = self.model.get_submodule(path)
            # First, since a read would write what is out of date.
            given = torch.ones(2, layer.in_features, dtype=self.dense[name].dtype)
            other = {each: self.dense.get(f"{path}.{each}", getattr(layer, each)) for each in ("weight", "bias")}
            if local == "weight":
                assert torch.equal(layer(given), F.linear(given, *other.values())), name
            assert torch.equal(self.read(name), self.dense[name]), name

    def check_gradients(self) -> None:
        weights = {name: torch.rand_like(dense) for name, dense in self.dense.items()}
        training = {name for name in self.dense if self.values(name).requires_grad}
        total = sum((self.read(name) * weights[name]).sum() for name in self.dense)
        for name in self.dense:
            assert self.read(name).requires_grad is (name in training)
            self.values(name).grad = None
        if training:
            total.backward()  # type: ignore[union-attr]
        for name in training:
            assert torch.equal(self.values(name).grad.flatten(), weights[name][self.mask[name]])


def in_place(book: Bookkept, name: str) -> None:
    with torch.no_grad():
        book.values(name).add_(1)
    book.set_entries(name, lambda entries: entries + 1)


def by_data(book: Bookkept, name: str) -> None:
    book.values(name).data.mul_(2)
    book.set_entries(name, lambda entries: entries * 2)


def other_memory(book: Bookkept, name: str) -> None:
    book.values(name).data = book.values(name).detach() - 1
    book.set_entries(name, lambda entries: entries - 1)


def by_an_engine(book: Bookkept, name: str) -> None:
    """As engines do that train a copy: they hold the memory, and their optimizer steps on something else."""
    memory = book.values(name).data
    book.check([name])
    memory.add_(3)
    book.set_entries(name, lambda entries: entries + 3)
    stray = nn.Parameter(torch.ones(1))
    stray.grad = torch.ones(1)
    torch.optim.SGD([stray], lr=0.1).step()


def whole(book: Bookkept, name: str) -> None:
    new = torch.randn_like(book.dense[name])
    with torch.no_grad():
        book.read(name).copy_(new)
    book.dense[name] = new
    book.check([name])  # before the values change again, which come first then


def whole_held(book: Bookkept, name: str) -> None:
    """Written into a tensor that was read long ago, after the values changed."""
    by_data(book, name)
    if book.held[name] is book.read(name):
        new = torch.randn_like(book.dense[name])
        with torch.no_grad():
            book.held[name].copy_(new)
        book.dense[name] = new
        book.check([name])


def whole_by_data(book: Bookkept, name: str) -> None:
    book.read(name).data.fill_(0.5)
    book.dense[name].fill_(0.5)
    book.check([name])


def step(book: Bookkept, name: str) -> None:
    names = book.choose.sample(sorted(book.dense), 2)
    optimizer = torch.optim.SGD([book.values(each) for each in names], lr=1.0)
    for each in names:
        book.values(each).grad = torch.ones_like(book.values(each))
        book.set_entries(each, lambda entries: entries - 1)
    optimizer.step()


def step_with_a_closure(book: Bookkept, name: str) -> None:
    """As sharpness-aware minimisation does: somewhere else for a pass, and back through `.data`."""

    class There(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            (values,) = self.param_groups[0]["params"]
            before = values.detach().clone()
            with torch.no_grad():
                values.add_(1)
            closure()
            values.data = before
            return super().step()

    def closure() -> None:
        book.set_entries(name, lambda entries: entries + 1)
        book.check([name])
        book.dense[name] = dense

    dense = book.dense[name].clone()
    values = book.values(name)
    values.grad = torch.ones_like(values)
    There([values], lr=1.0).step(closure)
    book.set_entries(name, lambda entries: entries - 1)


def step_that_fails(book: Bookkept, name: str) -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.param_groups[0]["params"][0].data.add_(1)
            raise ArithmeticError

    book.set_entries(name, lambda entries: entries + 1)
    with pytest.raises(ArithmeticError):
        Fails([book.values(name)], lr=1.0).step()
    if book.choose.random() < 0.5:
        book.check([name])
    by_data(book, name)


def whole_in_other_memory(book: Bookkept, name: str) -> None:
    new = torch.randn_like(book.dense[name])
    book.read(name).data = new.clone()
    book.dense[name] = new
    book.check([name])


def freeze(book: Bookkept, name: str) -> None:
    values = book.values(name)
    if book.choose.random() < 0.5:
        values.requires_grad = not values.requires_grad
    else:
        values.requires_grad_(not values.requires_grad)


def load(book: Bookkept, name: str) -> None:
    book.model.load_state_dict({name: (new := torch.randn_like(book.dense[name]))}, strict=False)
    book.dense[name] = new


def assign(book: Bookkept, name: str) -> None:
    book.model.load_state_dict({name: (new := torch.randn_like(book.dense[name]))}, strict=False, assign=True)
    book.dense[name] = new.clone()


def to_dtype(book: Bookkept, name: str) -> None:
    dtype = book.choose.choice([torch.float32, torch.float64])
    book.model.to(dtype)
    book.dense = {each: dense.to(dtype) for each, dense in book.dense.items()}


def copied(book: Bookkept, name: str) -> None:
    old, before = book.model, {each: dense.clone() for each, dense in book.dense.items()}
    book.model = copy.deepcopy(old) if book.choose.random() < 0.5 else pickle.loads(pickle.dumps(old))
    new, book.model = book.model, old
    in_place(book, name)  # which the copy does not see
    book.model, book.dense = new, before


def whole_unread(book: Bookkept, name: str) -> None:
    """What is written into the tensor stays, though nobody reads it before something else is done."""
    new = torch.randn_like(book.dense[name])
    with torch.no_grad():
        book.read(name).copy_(new)
    book.dense[name] = new
    book.choose.choice([step, freeze, to_dtype, copied])(book, name)


ACTS = [
    in_place, by_data, other_memory, by_an_engine, whole, whole_held, whole_by_data, step, freeze, load, assign,
    to_dtype, copied, step_with_a_closure, step_that_fails, whole_in_other_memory,
    whole_unread,
]  # fmt: skip


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_each_alone_and_twice(act: Callable[[Bookkept, str], None]) -> None:
    book = Bookkept(0)
    for name in book.dense:
        for _ in range(2):
            act(book, name)
            book.check(list(book.dense))
            book.check_gradients()


@pytest.mark.parametrize("seed", range(12))
def test_any_order(seed: int) -> None:
    book = Bookkept(seed)
    for _ in range(60):
        book.choose.choice(ACTS)(book, book.choose.choice(sorted(book.dense)))
        book.check([name for name in sorted(book.dense) if book.choose.random() < 0.3])
        if book.choose.random() < 0.2:
            book.check_gradients()
    book.check(list(book.dense))
    dense = book.model.state_dict()
    assert all(torch.equal(dense[name], book.dense[name]) for name in book.dense)


def test_frozen_before_a_step() -> None:
    """The step writes the values; the tensor that reads give must be made anew nevertheless."""
    book = Bookkept(0)
    book.values("0.weight").requires_grad_(False)
    torch.optim.SGD([book.values("2.weight")], lr=1.0).step()
    book.check_gradients()


def test_written_before_others_are_masked_too() -> None:
    """Who joins a group is written into there as before: an adapter's mask comes after another's."""
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    apply_mask(model, {"0.weight": torch.eye(4, 3, dtype=torch.bool)})
    new = torch.randn(4, 3)
    with torch.no_grad():
        model[0].weight.copy_(new)
    model[0].requires_grad_(False)
    apply_mask(model, {"1.weight": torch.eye(2, 4, dtype=torch.bool)})
    assert torch.equal(model[0].weight, new)


def test_a_model_as_it_is_masked_is_settled() -> None:
    """The fast path, which nothing else here would miss: values in one memory with one count."""
    book = Bookkept(0)
    step(book, "0.weight")
    book.check(list(book.dense))
    groups = {tensor.masked.group for tensor in book.tensors() if tensor.masked.values is not None}
    assert max(len(group.members) for group in groups) == 3
    assert all(group.settled for group in groups)


class CalledWithOthers:
    """A masked model and an unmasked one, which compute with values that are given for a call."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.dense = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.mask = {n: torch.arange(p.numel()).view(p.shape) % 2 == 0 for n, p in self.dense.named_parameters()}
        self.model = copy.deepcopy(self.dense)
        apply_mask(self.model, self.mask)
        self.own = dict(self.model.named_parameters())
        self.other = {name: parameter.detach() + 1 for name, parameter in self.own.items()}
        self.given = torch.randn(2, 3)

    def masked(self, values: dict[str, Tensor]) -> Tensor:
        return functional_call(self.model, values, self.given)

    def unmasked(self, values: dict[str, Tensor]) -> Tensor:
        state = self.dense.state_dict()
        whole = {name: state[name].masked_scatter(self.mask[name], entries) for name, entries in values.items()}
        return functional_call(self.dense, whole, self.given)


def test_a_call_with_other_values_leaves_the_model_as_it_is() -> None:
    called = CalledWithOthers()
    before = called.model(called.given)
    assert torch.equal(called.masked(called.other), called.unmasked(called.other))
    assert torch.equal(called.model(called.given), before)


def test_calls_with_several_values_may_be_in_one_graph() -> None:
    """As in MAML: the gradient goes through a step that the graph holds."""

    def loss(call: Callable[[dict[str, Tensor]], Tensor], first: dict[str, Tensor]) -> Tensor:
        grads = torch.autograd.grad(call(first).square().sum(), list(first.values()), create_graph=True)
        stepped = {name: each - 0.1 * grad for (name, each), grad in zip(first.items(), grads, strict=True)}
        return call(stepped).square().sum()

    called = CalledWithOthers()
    dense = {name: parameter.detach().clone().requires_grad_() for name, parameter in called.own.items()}
    loss(called.unmasked, dense).backward()  # type: ignore[no-untyped-call]
    loss(called.masked, called.own).backward()  # type: ignore[no-untyped-call]
    for name, parameter in called.own.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, dense[name].grad)


def test_transforms_of_a_call_with_other_values() -> None:
    called = CalledWithOthers()

    def masked(values: dict[str, Tensor]) -> Tensor:
        return called.masked(values).square().sum()

    def dense(values: dict[str, Tensor]) -> Tensor:
        return called.unmasked(values).square().sum()

    values = called.other
    torch.testing.assert_close(grad(masked)(values), grad(dense)(values))
    torch.testing.assert_close(jvp(masked, (values,), (values,)), jvp(dense, (values,), (values,)))
    several = {name: torch.stack([each, each + 1]) for name, each in values.items()}
    one_by_one = [masked({name: each[place] for name, each in several.items()}) for place in range(2)]
    torch.testing.assert_close(vmap(masked)(several), torch.stack(one_by_one))


def test_a_call_in_another_dtype() -> None:
    called = CalledWithOthers()
    expected, called.given = called.model(called.given), called.given.double()
    torch.testing.assert_close(called.masked({n: p.double() for n, p in called.own.items()}).float(), expected)


def every_position_is(model: nn.Module, mask: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(tensor.masked.index, mask[tensor.name].flatten().nonzero()[:, 0])
        for tensor in masked_tensors(model)
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model,
        lambda model: model.double(),
        lambda model: copy.deepcopy(model),
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.requires_grad_(False),
    ],
    ids=["as it is", "double", "deepcopy", "pickle", "frozen"],
)
def test_positions_are_kept_once_and_are_those_of_the_mask(change: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))
    mask = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters()}
    apply_mask(model, mask)
    model = change(model)
    assert every_position_is(model, mask)
    found = [tensor.masked for tensor in masked_tensors(model)]
    groups = {each.group: each.group.joined[1] for each in found}
    assert all(each.own_index is None for each in found)
    assert sum(index.nbytes for index in groups.values()) == 4 * sum(each.num_selected for each in found)


def loaded(model: nn.Module) -> nn.Module:
    model.load_state_dict({"weight": torch.zeros(3, 4), "bias": torch.full((3,), 7.0)})
    return model


@pytest.mark.parametrize(
    "change", [copy.deepcopy, nn.Module.double, lambda model: pickle.loads(pickle.dumps(model)), loaded]
)
@pytest.mark.parametrize("local", ["weight", "bias"])
def test_other_memory_of_a_tensor_without_values_goes_with_the_model(
    local: str, change: Callable[[nn.Module], nn.Module]
) -> None:
    """As PEFT's safe merge gives it."""
    dense: Any = nn.Linear(4, 3)
    model = copy.deepcopy(dense)
    mask = {"weight": torch.eye(3, 4, dtype=torch.bool), "bias": torch.ones(3, dtype=torch.bool)}
    apply_mask(model, mask | {local: torch.zeros_like(mask[local])})
    for each in (dense, model):
        getattr(each, local).data = getattr(each, local).data + 5
    given = torch.ones(2, 4)
    assert torch.equal(model(given), dense(given))
    dense, model = change(dense), change(model)
    given = given.to(dense.weight.dtype)
    assert torch.equal(model(given), dense(given))
    assert torch.equal(getattr(model, local), getattr(dense, local))


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("size", [4, 300])
def test_a_whole_tensor_in_the_place_of_values_is_refused(size: int, copied: bool) -> None:
    model = nn.Sequential(nn.Linear(size, size), nn.Linear(size, size))
    apply_mask(model, {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters()})
    given = torch.ones(2, size)
    expected = model(given)

    def give(to: Any) -> None:
        to[0]._parameters["weight"].data = torch.ones(size, size)
        to(given)

    with pytest.raises(MaskError, match=rf"of shape \({size}, {size}\), was given as the .data of a masked one's"):
        give(copy.deepcopy(model) if copied else model)  # before anything of the copy is read
    assert torch.equal(model(given), expected)


def test_a_recurrent_layer_comes_from_the_meta_device() -> None:
    """It reads its tensors in the middle of its move."""
    model = nn.GRU(3, 4)
    apply_mask(model, {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters()})
    given = torch.ones(2, 1, 3)
    state, expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(given)[0]
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(state)
    assert torch.equal(model(given)[0], expected)


def test_positions_of_those_that_stay_when_one_of_a_group_goes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))
    mask = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters()}
    apply_mask(model, mask)
    first, *others = masked_tensors(model)
    unmask_tensor(first, trains=True)
    assert [tensor.name for tensor in masked_tensors(model)] == [tensor.name for tensor in others]
    assert every_position_is(model, mask)


def test_gradients_where_one_of_a_group_has_none() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))
    mask = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters()}
    dense = copy.deepcopy(model)
    apply_mask(model, mask)
    inputs = torch.randn(2, 3)
    for each in (model, dense):
        each[1](each[0](inputs)).square().sum().backward()
    for name, values in model.named_parameters():
        whole = dict(dense.named_parameters())[name].grad
        assert (values.grad is None) == (whole is None)
        assert values.grad is None or torch.equal(values.grad.flatten(), whole[mask[name]])


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_in_batches(create_graph: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    apply_mask(model, {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters()})
    outputs, values = model(torch.randn(2, 3)).flatten(), list(model.parameters())
    batched = torch.autograd.grad(
        outputs, values, torch.eye(4), is_grads_batched=True, create_graph=create_graph, retain_graph=True
    )
    for number, output in enumerate(outputs):
        alone = torch.autograd.grad(output, values, retain_graph=True)
        for one, many in zip(alone, batched, strict=True):
            torch.testing.assert_close(many[number], one)


def test_hooks_on_values_see_gradients_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4))
    apply_mask(model, {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters()})
    seen: list[int] = []
    handles = [
        values.register_hook(lambda gradient, place=place: seen.append(place) or 2 * gradient)
        for place, values in enumerate(model.parameters())
    ]
    model[0](torch.ones(2, 3)).sum().backward()
    gradients = [values.grad for values in model.parameters()]
    assert sorted(seen) == [0, 1]
    assert torch.equal(gradients[1], torch.full((4,), 4.0))
    assert gradients[2] is gradients[3] is None
    for handle in handles:
        handle.remove()
    model[1](torch.ones(2, 3)).sum().backward()
    assert sorted(seen) == [0, 1]


def test_what_an_earlier_version_pickled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    apply_mask(model, {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters()})
    state = Group.__getstate__

    def earlier(self: Group) -> dict[str, Any]:
        return {name: value for name, value in state(self).items() if name != "_places"}

    monkeypatch.setattr(Group, "__getstate__", earlier)
    stored = pickle.dumps(model)
    with pytest.raises(MaskError, match="pickled by an earlier version of fish-tuning"):
        pickle.loads(stored)


class Segment(nn.Module):
    """Reads a layer twice, and a table with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(4, 4), nn.Embedding(3, 4, sparse=True)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.linear(self.linear(hidden).tanh() * self.linear.weight[0]) + self.table(torch.tensor([2]))
        return result


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_segments_run_the_hooks_of_their_own_values_alone(reentrant: bool) -> None:
    """As without a mask: each backward pass of a reentrant checkpoint reaches one segment, of a group of many."""
    torch.manual_seed(0)
    masked: Any = nn.Sequential(Segment(), Segment(), Segment())
    whole = copy.deepcopy(masked)
    mask = {name: torch.rand(p.shape) < 0.6 for name, p in whole.named_parameters()}
    apply_mask(masked, mask)
    seen: dict[nn.Module, list[str]] = {masked: [], whole: []}
    inputs = torch.randn(2, 4, requires_grad=True)
    held = []
    for model, called in seen.items():
        for name, parameter in model.named_parameters():
            node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
            node.register_hook(lambda *_, name=name, called=called: called.append(name))
            held.append(node)
            parameter.register_post_accumulate_grad_hook(
                lambda *_, name=name, called=called: called.append(f"after {name}")
            )
        hidden: Any = inputs
        for segment in model:
            hidden = checkpoint(segment, hidden, use_reentrant=reentrant)  # type: ignore[no-untyped-call]
        hidden.square().sum().backward()
    assert sorted(seen[masked]) == sorted(seen[whole])
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for name, values in masked.named_parameters():
        torch.testing.assert_close(values.grad.flatten(), gradients[name].to_dense()[mask[name]])


class Rewriting(nn.Module):
    """Writes into its weight in each forward pass, as constrained OFT does."""

    def __init__(self, write: Callable[[Any], None]) -> None:
        super().__init__()
        self.weight, self.bias, self.write = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3)), write

    def forward(self, hidden: Tensor) -> Tensor:
        self.write(self)
        return hidden @ self.weight + self.bias.sum()


def doubles(module: Any) -> None:
    with torch.no_grad():
        module.weight.mul_(2)


def doubles_data(module: Any) -> None:
    module.weight.data = module.weight.data * 2


def sets_what_it_has(module: Any) -> None:
    module.weight = module.weight


@pytest.mark.parametrize("write", [doubles, doubles_data, sets_what_it_has])
def test_what_recomputed_segments_write_counts(write: Callable[[Any], None]) -> None:
    module = Rewriting(write)
    apply_mask(module, {name: torch.eye(3, dtype=torch.bool) for name in ("weight", "bias")})
    checkpoint(module, torch.ones(3, requires_grad=True), use_reentrant=True).sum().backward()  # type: ignore[no-untyped-call]
    written = 1.0 if write is sets_what_it_has else 4.0
    assert torch.equal(module.weight.detach(), torch.full((3, 3), written))
    assert torch.equal(dict(module.named_parameters())["weight"].detach(), torch.full((3, 1), written))
