"""What later batches have that the first, which proves the rules, did not: it must not pass for what was proven."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from tiny import Batch, assert_scores_close, causal_batch, llama, rebatch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from fish_tuning import FisherError, FishTuningWarning, calculate_fisher_information, measure_moments
from fish_tuning.scores import later_looks
from fish_tuning.scores.batches import padded_rows
from fish_tuning.scores.scorer import Scorer


def scored(model: nn.Module, loader: list[Batch], method: str = "auto") -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FishTuningWarning)
        return calculate_fisher_information(model, loader, warmup_steps=0, progress=False, method=method)  # type: ignore[arg-type]


class Classifier(nn.Module):
    loss_type = "ForSequenceClassification"

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(width, 3)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(x.mean(1))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, labels: Tensor | None = None) -> object:
        logits = self.logits(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return type("Output", (), {"logits": logits, "loss": loss})()


class Gain(nn.Module):
    """A layer without a rule, with a table of positions that all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x * self.gain + torch.tanh(table * self.gain)


class WithTable(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Gain()
        self.register_buffer("table", torch.randn(5, 4))

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(self.layer(x, self.table))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(3, 5), (5, 5), (5, 3)])
def test_what_all_examples_share_is_not_taken_for_them_where_the_numbers_fit(
    sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    loader = [{"x": torch.randn(n, 5, 4, generator=generator).to(dtype), "labels": torch.arange(n) % 3} for n in sizes]
    model = WithTable().to(dtype)
    tolerance = {"rtol": 0.02, "atol": 1e-4} if dtype is torch.bfloat16 else {}
    for name, score in scored(model, loader, method="loop").items():
        torch.testing.assert_close(scored(model, loader)[name], score, **tolerance)  # type: ignore[arg-type]


class SequenceFirst(Classifier):
    """Its layer has the tokens of all examples, those of one position after those of another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def logits(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        flat = torch.tanh(self.layer(x.transpose(0, 1).reshape(-1, width)))
        return super().logits(flat.view(tokens, rows, width).transpose(0, 1))


def test_several_rows_an_example_are_no_rows_in_order_because_one_was() -> None:
    generator = torch.Generator().manual_seed(1)
    loader = [{"x": torch.randn(4, tokens, 4, generator=generator), "labels": torch.arange(4) % 3} for tokens in (1, 3)]
    model = SequenceFirst()
    assert_scores_close(scored(model, loader), scored(model, loader, method="loop"))


@pytest.mark.parametrize("sides", [("right", "left"), ("left", "right")])
def test_padding_on_another_side_is_proven_again(sides: tuple[str, str]) -> None:
    # Virtual tokens stand before the row, so what is padded on the left has them elsewhere.
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    loader = [causal_batch((5, 9, 3, 7), side=side) for side in sides]
    assert_scores_close(scored(model, loader), scored(model, loader, method="loop"))


def test_rows_that_are_padded_in_several_ways_are_each_looked_at() -> None:
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    left, right = causal_batch((6, 9), side="left"), causal_batch((9, 3), side="right")
    batch = {key: torch.cat([left[key], right[key]]) for key in left}
    assert_scores_close(scored(model, rebatch(batch, 4)), scored(model, [batch], method="loop"))


class ReadsItsPadding(Classifier):
    """What it says of a row depends on whether more than half of it is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> object:
        mask = attention_mask[..., None].to(inputs_embeds.dtype)
        hidden = torch.tanh(self.layer(inputs_embeds)) * mask
        little = (mask.mean(1, keepdim=True) > 0.5) & (mask.mean(1, keepdim=True) < 1)
        return super().forward(
            torch.where(little, hidden * 3, hidden).sum(1, keepdim=True) / mask.sum(1, keepdim=True), labels
        )


def padded_batch(*lengths: int, width: int = 9, dtype: torch.dtype = torch.float32) -> Batch:
    mask = torch.tensor([[1] * length + [0] * (width - length) for length in lengths])
    x = torch.randn(len(lengths), width, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    return {"inputs_embeds": x, "attention_mask": mask, "labels": torch.arange(len(lengths)) % 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_least_padded_row_is_looked_at_too(dtype: torch.dtype) -> None:
    batch = padded_batch(9, 4, 7, 9, dtype=dtype)
    model = ReadsItsPadding().to(dtype)
    scores, by_loop = scored(model, [batch]), scored(model, [batch], method="loop")
    tolerance = {"rtol": 0.05, "atol": 1e-3} if dtype is torch.bfloat16 else {}
    for name, score in by_loop.items():
        torch.testing.assert_close(scores[name], score, **tolerance)  # type: ignore[arg-type]


class PoolsTwoTokens(Classifier):
    """As Funnel does: where a row has an odd number of tokens, its last one is pooled with padding, if there is any.

    `rare` has next to no gradient but where a row of seven tokens is alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rare = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> object:
        x = inputs_embeds * attention_mask[..., None]
        x = x + self.rare(x) * (1.0 if x.shape[1] == 7 else 1e-6)
        pooled = nn.functional.avg_pool1d(x.transpose(1, 2), 2, ceil_mode=True).transpose(1, 2)
        return super().forward(torch.tanh(self.layer(pooled)), labels)


@pytest.mark.parametrize("earlier", [False, True])
def test_where_padding_is_read_no_tensor_is_scored_by_rule(earlier: bool) -> None:
    """Also one that no row which is looked at tells anything of."""
    padded = padded_batch(10, 3, 7, 9, 5, width=10)
    loader = [padded_batch(10, 10, width=10), padded] if earlier else [padded]
    model = PoolsTwoTokens()
    scores, by_loop = scored(model, loader), scored(model, loader, method="loop")
    assert float(by_loop["rare.weight"].max()) > 1e-5
    assert_scores_close(scores, by_loop)


def test_the_ways_of_padding() -> None:
    mask = torch.tensor(
        [[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 0]]
    )
    left, within, right = (True, False, False), (False, True, False), (False, False, True)
    batch = {"attention_mask": mask}
    assert padded_rows(batch) == {left: (1, 2), within: (5, 5), right: (6, 3), (True, False, True): (4, 4)}
    assert padded_rows({"attention_mask": torch.ones(2, 3)}) == padded_rows({"x": mask}) == {}
    labels = torch.full((7, 4), -100)
    labels[[2, 3], 1:] = 1  # rows without a label that counts tell nothing, where another is padded so
    assert padded_rows(batch | {"labels": labels}) == {
        left: (2, 2), within: (5, 5), right: (3, 3), (True, False, True): (4, 4),
    }  # fmt: skip


def test_positions_are_those_of_a_row_whatever_others_are_padded_like() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=128, n_positions=16)).eval()
    left, right = causal_batch((9, 4), side="left"), causal_batch((9, 3), side="right")
    mixed = {key: torch.stack([left[key][1], right[key][1]]) for key in left}
    assert_scores_close(scored(model, [left, mixed]), scored(model, [left, mixed], method="loop"))


class Changes(Classifier):
    """What it computes, and whether examples reach each other, may depend on what a batch holds."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(4, 4), how

    def logits(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(x))
        if bool((x > 5).any()):
            hidden = hidden + (hidden @ self.layer.weight if self.how == "twice" else hidden.mean(0))
        return super().logits(hidden)


def late_outliers(size: int = 8, batches: int = 12, first: int = 8) -> list[Batch]:
    torch.manual_seed(1)
    loader = [{"x": torch.randn(size, 3, 4).clamp(-2, 2), "labels": torch.arange(size) % 3} for _ in range(batches)]
    for batch in loader[first:]:
        batch["x"][:, 0, 0] = 7
    return loader


@pytest.mark.parametrize("how", ["twice", "across"])
def test_what_later_examples_change_is_seen_and_all_is_added_anew(how: str) -> None:
    model, loader = Changes(how), late_outliers()
    with pytest.warns(FishTuningWarning, match=r"rule failed for \d of 4 tensors"):
        moments = measure_moments(model, loader, warmup_steps=0, progress=False)
    by_loop = measure_moments(model, loader, warmup_steps=0, method="loop", progress=False)
    assert_scores_close(moments.mean_squares, by_loop.mean_squares)
    assert_scores_close(moments.mean_gradients, by_loop.mean_gradients)
    assert_scores_close(scored(model, loader), by_loop.mean_squares)


def test_a_loader_may_use_its_memory_again() -> None:
    loader = late_outliers()

    def one_memory() -> Iterator[Batch]:
        held = {key: value.clone() for key, value in loader[0].items()}
        for batch in loader:
            for key, value in batch.items():
                held[key].copy_(value)
            yield held

    model = Changes("twice")
    with pytest.warns(FishTuningWarning, match="rule failed"):
        scores = calculate_fisher_information(model, one_memory(), progress=False)
    assert_scores_close(scores, scored(model, loader, method="loop"))


def test_single_examples_among_batches_are_added_anew_too() -> None:
    loader = late_outliers()
    loader.insert(1, {key: value[:1] for key, value in loader[2].items()})
    model = Changes("twice")
    assert_scores_close(scored(model, loader), scored(model, loader, method="loop"))


def test_where_earlier_batches_are_too_many_to_be_kept_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(later_looks, "_KEPT_BYTES", 1000)
    with pytest.raises(FisherError, match=r"after 64 examples.* method='loop'"):
        calculate_fisher_information(Changes("twice"), late_outliers(), progress=False)


def test_later_looks_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    alone = Scorer._of_examples

    def noted(self: Scorer, batch: Batch, first: int, numbers: list[int], names: list[str]) -> Any:
        seen.append(first)
        return alone(self, batch, first, numbers, names)

    monkeypatch.setattr(Scorer, "_of_examples", noted)
    scored(Changes("twice"), late_outliers(batches=40, first=40))
    assert seen == [0, 64, 144, 304]


class Groups(Classifier):
    """Rows of one group share the mean of their states; the first row's group has no other."""

    def forward(self, x: Tensor, group: Tensor, labels: Tensor | None = None) -> object:
        same = (group[:, None] == group[None]).to(x)
        return super().forward((same / same.sum(1, keepdim=True) @ self.layer(x).flatten(1)).view_as(x), labels)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


def test_a_first_row_that_others_do_not_reach_proves_nothing() -> None:
    torch.manual_seed(1)
    group = torch.tensor([0, *[1] * 15])
    batch = {"x": torch.randn(16, 3, 4), "group": group, "labels": torch.arange(16) % 3}
    model = Groups()
    assert_scores_close(scored(model, [batch]), scored(model, [batch], method="loop"))


class UsedTwice(Classifier):
    """A weight that is used once more behind a layer scale that makes next to nothing of it, as such scales start."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), scale

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x + self.scale * (torch.tanh(self.layer(x)) @ self.layer.weight))


@pytest.mark.parametrize("scale", [1, 1e-3, 1e-5])
def test_a_small_gradient_is_no_rounding(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    loader = [{"x": torch.randn(4, 3, 4, generator=generator), "labels": torch.arange(4) % 3} for _ in range(2)]
    model = UsedTwice(scale)
    scores, by_loop = scored(model, loader), scored(model, loader, method="loop")
    for name, score in by_loop.items():
        assert (scores[name] - score).norm() <= 1e-4 * score.norm()


class OfChunks(nn.Module):
    """Reads texts in chunks of two tokens, and no blank ones: as many as the batch has examples, or twice as many."""

    loss_type = "ForSequenceClassification"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.layer, self.head = nn.Embedding(16, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> object:
        chunks = input_ids.view(-1, 2)
        kept = chunks.any(1)
        text = torch.arange(len(input_ids)).repeat_interleave(len(chunks) // len(input_ids))[kept]
        states = torch.tanh(self.layer(self.words(chunks[kept]))).mean(1)
        return type(
            "Output", (), {"logits": self.head(states.new_zeros(len(input_ids), 4).index_add(0, text, states))}
        )()


@pytest.mark.parametrize("later", [(1, 3), (3, 1)])
def test_texts_need_not_have_equally_many_parts(later: tuple[int, int]) -> None:
    loader = [
        {
            "input_ids": torch.tensor(
                [[word + 1] * 2 * each + [0] * (6 - 2 * each) for word, each in enumerate(parts)]
            ),
            "labels": torch.arange(2),
        }
        for parts in ((2, 2), later)
    ]
    model = OfChunks()
    assert_scores_close(scored(model, loader), scored(model, loader, method="loop"))
