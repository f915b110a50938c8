"""Rows that data have put in their order are no examples one after another, though they are as many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import assert_scores_close
from torch import Tensor, nn

from fish_tuning import calculate_fisher_information
from fish_tuning.scores.row_order import READABLE, Known, ordered_by_data
from fish_tuning.scores.scorer import Scorer

IN_ORDER: dict[str, Callable[[Tensor], Tensor]] = {
    "folded": lambda x: x.flatten(0, 1),
    "changed in its place": lambda x: torch.relu(2 * x.reshape(-1, 6) + 1),
    "windows": lambda x: x.view(4, 2, 3, 6).flatten(0, 1),
    "picked before it is folded": lambda x: x[:, torch.tensor([2, 0, 1, 3, 4, 5])].flatten(0, 1),
    "a column of each row": lambda x: x.flatten(0, 1).gather(1, torch.randint(6, (24, 2))),
    "columns in order": lambda x: x.flatten(0, 1).sort(-1).values.index_select(1, torch.tensor([2, 1])),
    "the last of each": lambda x: x[torch.arange(4), torch.tensor([5, 2, 0, 3])],
    "the last of each choice": lambda x: x.view(8, 3, 6)[torch.arange(8), torch.randint(3, (8,))],
    "by a mask": lambda x: x[torch.eye(6)[:4].bool()],
    "of a table": lambda x: x.flatten(0, 1) + nn.Parameter(torch.randn(9, 6))[torch.randint(9, (24,))],
    "no fold": lambda x: x[torch.tensor([1, 0, 2, 3])],
    "two of each": lambda x: x[torch.arange(8) // 2, torch.tensor([5, 2, 0, 3, 1, 1, 4, 0])],
    "a window of each": lambda x: x[torch.arange(4)[:, None], torch.randint(6, (4, 3))].relu(),
    "columns of a pooled row": lambda x: x[:, 0][:, torch.tensor([2, 1])],
    "put in places": lambda x: x.clone().index_put(
        (torch.tensor([0, 1, 1]), torch.tensor([1, 2, 3])), torch.ones(3, 6)
    ),
    "stacked": lambda x: torch.stack([x[0, 3], x[1, :2].mean(0), x[2, -1], x[3, 0]]),
    "stacked from all tokens": lambda x: torch.stack([x.flatten(0, 1)[6 * row + row] for row in range(4)]),
    "joined": lambda x: torch.cat([row[:2] for row in x]),
    "in two pieces": lambda x: torch.cat([x.flatten(0, 1)[:1], x.flatten(0, 1)[1:]]).relu(),
}
BY_DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "picked": lambda x: x.flatten(0, 1)[torch.randperm(24)],
    "selected": lambda x: 2 * x.flatten(0, 1).index_select(0, torch.randperm(24)) + 1,
    "gathered": lambda x: x.flatten(0, 1).gather(0, torch.randperm(24)[:, None].expand(24, 6)),
    "before the last of each choice": lambda x: x.flatten(0, 1)[torch.randperm(24)].view(8, 3, 6)[torch.arange(8), 0],
    "as many as examples": lambda x: x.flatten(0, 1)[torch.tensor([7, 3, 11, 20])].relu(),
    "sorted": lambda x: x.flatten(0, 1).sort(0).values,
    "put": lambda x: torch.zeros(24, 6).index_add(0, torch.randperm(24), x.flatten(0, 1)),
    "two of an example": lambda x: x[torch.tensor([0, 1, 1, 3]), torch.tensor([2, 0, 3, 1])],
    "by a mask": lambda x: x[
        torch.eye(6)[[0, 1, 1, 3]].bool() | (torch.arange(4) == 1)[:, None] & torch.eye(6)[5].bool()
    ],
    "windows of an example": lambda x: nn.LayerNorm(6)(
        x[torch.tensor([0, 1, 1, 3])[:, None], torch.randint(6, (4, 3))]
    ),
    "an example twice": lambda x: nn.LayerNorm(6)(x[torch.tensor([0, 1, 1, 3])]).relu(),
    "stacked": lambda x: torch.stack([x[0, 3], x[1, :2].mean(0), x[1, 4], x[3, 0]]),
    "stacked from all tokens": lambda x: torch.stack([x.flatten(0, 1)[6 * row + 2] for row in (0, 1, 1, 3)]),
    "windows stacked": lambda x: torch.stack([x[row, :3] for row in (0, 1, 1, 3)]),
    "joined": lambda x: torch.cat([x[0, :1], x[1, 2:4], x[3, :1]]),
    "packed": lambda x: nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 4, 3, 1]), batch_first=True).data,
    "behind a layer": lambda x: nn.Linear(6, 6)(x.flatten(0, 1)[torch.randperm(24)]).tanh(),
}


# Torch before `SavedTensor.data`: what is picked of examples passes for picked by data, but for rows of them.
UNREAD = (
    "the last of each", "the last of each choice", "by a mask", "two of each", "columns of a pooled row",
    "windows of an example", "an example twice",
)  # fmt: skip


def ways(functions: dict[str, Callable[[Tensor], Tensor]]) -> list[Any]:
    unread = pytest.mark.skipif(not READABLE, reason="this torch does not say what was picked")
    return [pytest.param(way, marks=unread if way in UNREAD else ()) for way in functions]


@pytest.mark.parametrize("way", ways(IN_ORDER))
def test_in_order(way: str) -> None:
    assert not ordered_by_data(IN_ORDER[way](torch.randn(4, 6, 6, requires_grad=True).clone()), 4)


@pytest.mark.parametrize("way", ways(BY_DATA))
def test_by_data(way: str) -> None:
    assert ordered_by_data(BY_DATA[way](torch.randn(4, 6, 6, requires_grad=True).clone()), 4)
    assert not ordered_by_data(BY_DATA[way](torch.randn(4, 6, 6)).detach(), 4), "without a gradient there is no graph"


def test_what_one_layer_has_told_holds_for_the_next() -> None:
    x, rows, known = torch.randn(4, 6, 6, requires_grad=True).clone(), torch.tensor([0, 1, 1, 3]), Known()
    before = nn.LayerNorm(6)(x).relu()
    assert not ordered_by_data(before, 4, known)
    assert not known.picked
    picked = nn.LayerNorm(6)(before[rows[:, None], torch.randint(6, (4, 3))])
    for _ in range(3):
        assert ordered_by_data(picked, 4, known)
        picked = nn.Linear(6, 6)(picked).tanh()
    assert not ordered_by_data(before.tanh(), 4, known)
    known.forget_nodes()
    assert known == Known()


class Routed(nn.Module):
    """Its expert has all tokens, those of the second batch in another order."""

    loss_type = "ForSequenceClassification"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.expert, self.head = nn.Embedding(40, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor) -> object:
        words = self.words(input_ids)
        order = (input_ids.flatten() < 20).long().argsort(stable=True)
        mixed = words.flatten(0, 1)[order]
        back = self.expert(mixed).tanh()[order.argsort()].view_as(words)
        return type("Output", (), {"logits": self.head(back.sum(1))})()


class Expert(Routed):
    """It has one token of the first example and three of the last, as many as there are examples."""

    def forward(self, input_ids: Tensor) -> object:
        words = self.words(input_ids)
        chosen = (input_ids.flatten() >= 30).nonzero()[:, 0]
        mixed = words.flatten(0, 1).index_add(0, chosen, self.expert(words.flatten(0, 1)[chosen]).tanh())
        return type("Output", (), {"logits": self.head(mixed.view_as(words).sum(1))})()


def test_a_number_that_fits_by_chance_is_no_batch(caplog: pytest.LogCaptureFixture) -> None:
    """The example that is looked at alone has its token in its place."""
    model, ids = Expert(), torch.randint(0, 30, (4, 6))
    ids[0, 2] = 35
    ids[3, [0, 1, 5]] = torch.tensor([31, 36, 39])
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 0])}
    with caplog.at_level("INFO", "fish_tuning"):
        scores = calculate_fisher_information(model, [batch], progress=False)
    assert "expert.weight: data decide where an example's rows are" in caplog.text
    assert_scores_close(scores, calculate_fisher_information(model, [batch], method="loop", progress=False))


def without_gradient(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids)  # type: ignore[no-any-return]


BODIES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "trained": lambda model, ids: model(ids),
    "frozen": lambda model, ids: model(ids),
    "under no_grad": without_gradient,
    "detached": lambda model, ids: model(ids).detach(),
}


class Mentions(nn.Module):
    """Its layer has the marked tokens, of which a text may have none or several."""

    loss_type = "ForSequenceClassification"

    def __init__(self, body: str = "trained") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.mention, self.head = nn.Embedding(40, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.words.requires_grad_(body != "frozen")
        self.body = BODIES[body]

    def forward(self, input_ids: Tensor) -> object:
        hidden = self.body(self.words, input_ids)
        row, column = (input_ids >= 30).nonzero(as_tuple=True)
        mixed = hidden[:, 0].index_add(0, row, self.mention(hidden[row, column]).tanh())
        return type("Output", (), {"logits": self.head(mixed)})()


def marked(*mentions: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 30, (len(mentions), 6), generator=torch.Generator().manual_seed(len(mentions)))
    for row, number in enumerate(mentions):
        ids[row, 1 : 1 + number] = 30 + row
    return {"input_ids": ids, "labels": torch.arange(len(mentions)) % 3}


@pytest.mark.filterwarnings("ignore::fish_tuning.FishTuningWarning")
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("mentions", [[(1, 1, 1, 1), (2, 0, 1, 1)], [(1, 2, 0, 1)]], ids=["later", "at once"])
def test_tokens_that_are_picked_are_as_many_as_texts_by_chance(body: str, mentions: list[tuple[int, ...]]) -> None:
    batches = [marked(*numbers) for numbers in mentions]
    scores = calculate_fisher_information(Mentions(body), batches, warmup_steps=0, progress=False)
    by_loop = calculate_fisher_information(Mentions(body), batches, method="loop", warmup_steps=0, progress=False)
    assert_scores_close(scores, by_loop)


class Twice(Mentions):
    """Its layer has the first token of all texts before it has those that are marked."""

    def forward(self, input_ids: Tensor) -> object:
        hidden = self.mention(self.body(self.words, input_ids)[:, 0]).tanh()
        row, column = (input_ids >= 30).nonzero(as_tuple=True)
        mixed = hidden.index_add(0, row, self.mention(self.body(self.words, input_ids)[row, column]).tanh())
        return type("Output", (), {"logits": self.head(mixed)})()


@pytest.mark.filterwarnings("ignore::fish_tuning.FishTuningWarning")
def test_each_call_of_a_layer_is_looked_at() -> None:
    batches = [marked(1, 1, 1, 1), marked(2, 0, 1, 1)]
    scores = calculate_fisher_information(Twice(), batches, warmup_steps=0, progress=False)
    assert_scores_close(scores, calculate_fisher_information(Twice(), batches, method="loop", progress=False))


class LastToken(Mentions):
    """As classifiers on top of decoders pool."""

    def forward(self, input_ids: Tensor) -> object:
        hidden = self.body(self.words, input_ids)
        last = hidden[torch.arange(len(input_ids)), (input_ids < 30).int().argmax(1)]
        return type("Output", (), {"logits": self.head(self.mention(last).tanh())})()


@pytest.mark.skipif(not READABLE, reason="this torch does not say what was picked")
def test_a_token_of_each_text_goes_by_rule(caplog: pytest.LogCaptureFixture) -> None:
    batches = [marked(1, 1, 1, 1), marked(2, 0, 1)]
    with caplog.at_level("INFO", "fish_tuning"):
        scores = calculate_fisher_information(LastToken(), batches, progress=False)
    assert "5 tensors by rules" in caplog.text
    assert "data decide" not in caplog.text
    by_loop = calculate_fisher_information(LastToken(), batches, method="loop", progress=False)
    assert_scores_close(scores, by_loop)


class Pooled(Mentions):
    def forward(self, input_ids: Tensor) -> object:
        hidden = self.body(self.words, input_ids)[:, 0]
        return type("Output", (), {"logits": self.head(self.mention(hidden).tanh())})()


@pytest.mark.parametrize("body", BODIES)
def test_what_is_pooled_of_a_body_that_does_not_train_goes_by_rule(body: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "fish_tuning"):
        calculate_fisher_information(Pooled(body), [marked(1, 1, 1, 1)], warmup_steps=0, progress=False)
    assert "data decide" not in caplog.text


def test_what_autograd_gave_to_hooks_is_not_asked_for() -> None:
    """Checkpointing would compute all of it again."""

    def pack(tensor: Tensor) -> tuple[Tensor]:
        return (tensor,)

    def unpack(packed: object) -> Tensor:
        raise AssertionError("asked for")

    x = torch.randn(4, 6, 6, requires_grad=True).clone()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        assert ordered_by_data(x[torch.arange(4), torch.arange(4)], 4)


class AmongOthers(nn.Module):
    """An expert in a list, which is all that trains."""

    loss_type = "ForSequenceClassification"

    def __init__(self, kind: type[Routed]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([kind().requires_grad_(False)])
        self.layers[0].expert.requires_grad_()

    def forward(self, input_ids: Tensor) -> object:
        output: object = self.layers[0](input_ids)
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Routed, Expert])
def test_what_nothing_before_it_trains_is_told_too(
    kind: type[Routed], dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """Its input needs no gradient, so a forward pass with a graph has to tell."""
    model = AmongOthers(kind).to(dtype)
    in_order, mixed = torch.randint(20, 30, (4, 6)), torch.randint(0, 30, (4, 6))
    for row, ids in enumerate((in_order, mixed)):  # as many of an expert's as there are examples, first in their places
        ids[:, 2] = 35 if row == 0 else ids[:, 2]
        ids[0, [0, 1, 3, 5]] = 36 if row == 1 else ids[0, [0, 1, 3, 5]]
    batches = [{"input_ids": ids, "labels": torch.tensor([0, 1, 2, 0])} for ids in (in_order, mixed)]
    with caplog.at_level("INFO", "fish_tuning"):
        scores = calculate_fisher_information(model, batches, progress=False)
    assert "data decide where an example's rows are" in caplog.text
    by_loop = calculate_fisher_information(model, batches, method="loop", progress=False)
    assert_scores_close(scores, by_loop, 1e-5 if dtype == torch.float32 else 0.05)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == list(scores)


def test_a_forward_pass_that_only_tells_leaves_the_next_ones_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what goes through the loop after it (Jamba, Qwen3-Next) would hand its gradients to rules."""
    left, by_data = [], Scorer._by_data

    def noted(self: Scorer, *args: Any) -> list[str]:
        found = by_data(self, *args)
        left.append(self.probes.state.anchor)
        return found

    monkeypatch.setattr(Scorer, "_by_data", noted)
    ids = torch.randint(20, 30, (4, 6))
    ids[:, 2] = 35  # an expert's, one of each example
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 0])}
    calculate_fisher_information(AmongOthers(Expert), [batch], progress=False)
    assert left == [None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_one_batch_proves_holds_for_the_next(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = Routed().to(dtype)
    in_order, mixed = torch.randint(20, 40, (4, 6)), torch.randint(0, 40, (4, 6))
    batches = [{"input_ids": ids, "labels": torch.tensor([0, 1, 2, 0])} for ids in (in_order, mixed)]
    with caplog.at_level("INFO", "fish_tuning"):
        scores = calculate_fisher_information(model, batches, progress=False)
    assert "expert.weight: data decide where an example's rows are" in caplog.text
    by_loop = calculate_fisher_information(model, batches, method="loop", progress=False)
    assert_scores_close(scores, by_loop, 1e-5 if dtype == torch.float32 else 0.05)
