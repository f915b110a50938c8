"""DDP and masks: in whichever backward passes gradients come, whenever masks come and go, processes train as one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import once_in_two_processes
from tiny import random_mask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fish_tuning import apply_mask, remove_mask, replace_mask
from fish_tuning.sparse.masked_tensors import masked_tensors

STEPS = 4
ROWS = 4  # a process, in each step
Step = Callable[[nn.Module, int], None]


class Block(nn.Module):
    """Reads tensors in the ways that layers do: through `nn.Linear`, by name, twice, as a table and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), nn.Parameter(torch.rand(8))
        self.table, self.other = nn.Embedding(5, 8), nn.Linear(8, 8, bias=False)

    def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
        hidden = self.linear(hidden * self.scale).tanh() + self.linear(hidden)
        hidden = hidden + self.table(ids) * self.scale
        return hidden + (hidden @ self.table.weight.T @ self.table.weight).tanh() + nn.functional.linear(
            hidden, self.other.weight
        )  # fmt: skip


class Net(nn.Module):
    """Blocks that are checkpointed or not; `kinds` has a letter for each: reentrant, not reentrant, plain, unused."""

    def __init__(self, kinds: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kinds, self.blocks = kinds, nn.ModuleList([Block() for _ in kinds])

    def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
        hidden = hidden.clone().requires_grad_()  # or a reentrant checkpoint would have no gradient
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            if kind == "p":
                hidden = block(hidden, ids)
            elif kind in "rn":
                made: Any = checkpoint(block, hidden, ids, use_reentrant=kind == "r")  # type: ignore[no-untyped-call]
                hidden = made
        return hidden.square().mean(dim=1)


class Towers(Net):
    """Two of them, each with a loss and a backward pass of its own."""

    def forward(self, hidden: Tensor, ids: Tensor) -> Any:
        return tuple(block(hidden, ids).square().mean(dim=1) for block in self.blocks)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.weight = inner, nn.Parameter(torch.ones(()))

    def forward(self, *inputs: Tensor) -> Tensor:
        result: Tensor = self.inner(*inputs) * self.weight
        return result


def mask_of(kinds: str, seed: int) -> dict[str, Tensor]:
    return random_mask(Net(kinds), 0.4, seed=seed, dense=["blocks.0.linear.bias"])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=0.01)


def batch(step: int, rank: int | None) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    hidden, ids = torch.randn(2 * ROWS, 8, generator=draw), torch.randint(5, (2 * ROWS,), generator=draw)
    part = slice(None) if rank is None else slice(ROWS * rank, ROWS * (rank + 1))
    return hidden[part], ids[part]


def train(rank: int | None, kinds: str, event: str = "", inside: str = "", **settings: Any) -> dict[str, Any]:
    """The weights in the end, and in each step the sum of all gradients; without a rank, in one process."""
    model = Towers(kinds) if kinds == "tt" else Net(kinds)
    if event != "apply":
        apply_mask(model, mask_of(kinds, 1))
    held: Any = model
    if inside:
        held = Outer(model) if inside == "outer" else torch.compile(model, backend="eager")
    model_of_step = held if rank is None else DistributedDataParallel(held, **settings)
    if event == "apply":
        apply_mask(model, mask_of(kinds, 1))
    optimizer, seen = sgd(held), []
    for step in range(STEPS):
        if step == 2 and event == "replace":
            replace_mask(model, mask_of(kinds, 2), optimizer)
        if step == 2 and event == "remove":
            remove_mask(model)
            optimizer = sgd(held)
        if step == 2 and event == "empty":
            remove_mask(model)
            apply_mask(model, {name: torch.zeros_like(each) for name, each in mask_of(kinds, 2).items()})
            return {"gradients": [], "weights": {}}
        losses = model_of_step(*batch(step, rank))
        for loss in losses if isinstance(losses, tuple) else (losses,):
            loss.mean().backward()
        seen.append(sum(p.grad.to_dense().double().sum().item() for p in held.parameters() if p.grad is not None))
        optimizer.step()
        optimizer.zero_grad()
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": seen,
        "apart": any(tensor.masked.group.apart for tensor in masked_tensors(model)),
    }


CASES: dict[str, Callable[[int | None], dict[str, Any]]] = {
    "plain": partial(train, kinds="ppp"),
    "checkpointed": partial(train, kinds="nnn"),
    "reentrant": partial(train, kinds="rrr"),
    "reentrant, small buckets": partial(train, kinds="rrr", bucket_cap_mb=1e-4),
    "reentrant, static graph": partial(train, kinds="rrr", static_graph=True),
    "reentrant after a plain layer": partial(train, kinds="prr"),
    "reentrant before a plain layer": partial(train, kinds="rrp"),
    "reentrant between others": partial(train, kinds="nrprn"),
    "unused": partial(train, kinds="pup", find_unused_parameters=True),
    "unused, static graph": partial(train, kinds="pup", static_graph=True),
    "two losses": partial(train, kinds="tt"),
    **{
        f"{event}, {name}": partial(train, kinds="pp", event=event, **settings)
        for event in ("replace", "apply", "remove", "empty")
        for name, settings in {
            "usual": {},
            "static graph": {"static_graph": True},
            "unused": {"find_unused_parameters": True},
        }.items()
    },
    **{
        f"replace inside {inside}{', unused' * unused}": partial(
            train, kinds="pp", event="replace", inside=inside, find_unused_parameters=unused
        )
        for inside in ("outer", "compiled")
        for unused in (False, True)
    },
}


def in_a_group_of_its_own(rank: int) -> list[float]:
    """What each process trains by itself stays so when its mask is replaced."""
    groups = [dist.new_group([each]) for each in range(2)]  # type: ignore[no-untyped-call]
    seen: list[float] = train(rank, "pp", event="replace", process_group=groups[rank])["gradients"]
    return seen


def mask_by_itself(rank: int) -> str:
    """A process masks what DDP does not have, and waits for no other."""
    if rank == 0:
        model = Net("p")
        DistributedDataParallel(Net("p"))  # its own processes verify this one
        apply_mask(model, mask_of("p", 1))
        remove_mask(model)
    else:
        DistributedDataParallel(Net("p"))
    return "done"


def worker(rank: int, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        try:
            results[name] = case(rank)
        except RuntimeError as error:  # of DDP; the other process has it too
            results[name] = str(error)
    return {**results, "own group": in_a_group_of_its_own(rank), "alone": mask_by_itself(rank)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return once_in_two_processes(worker, tmp_path_factory, "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name: str, results: list[dict[str, Any]]) -> None:
    first, second = (result[name] for result in results)
    assert not isinstance(first, str), first
    assert first["gradients"] == second["gradients"]
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    torch.testing.assert_close(first["weights"], CASES[name](None)["weights"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_groups_share_a_node_where_their_gradients_come_together(results: list[dict[str, Any]]) -> None:
    for result in results:
        apart = {
            name for name in ("plain", "checkpointed", "reentrant", "unused", "two losses") if result[name]["apart"]
        }
        assert apart == {"reentrant", "unused", "two losses"}


@pytest.mark.slow
def test_a_wrapper_keeps_its_process_group(results: list[dict[str, Any]]) -> None:
    own = [result["own group"] for result in results]
    assert all(first != second for first, second in zip(*own, strict=True))


@pytest.mark.slow
def test_what_no_wrapper_holds_is_masked_without_the_others(results: list[dict[str, Any]]) -> None:
    assert [result["alone"] for result in results] == ["done", "done"]
