"""A rule counts only once an example has proven it; until then the gradient of the whole batch must agree."""

from __future__ import annotations

import warnings

import pytest
import torch
from device import DEVICE
from tiny import (
    Batch,
    assert_scores_close,
    bert,
    causal_batch,
    classification_batch,
    llama,
    lora,
    rebatch,
    reference_fisher,
)
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

from fish_tuning import FishTuningWarning, calculate_fisher_information, register_rule
from fish_tuning.scores.layer_rules import _RULES


def scored(model: nn.Module, loader: Batch | list[Batch], **kwargs: object) -> dict[str, Tensor]:
    batches = [loader] if isinstance(loader, dict) else loader
    return calculate_fisher_information(model, batches, warmup_steps=0, progress=False, **kwargs)  # type: ignore[arg-type]


class PastTheLayer(nn.Module):
    """A layer whose weight is used without a call of it, and on rows alone whose first entry is positive."""

    loss_type = "ForSequenceClassification"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> object:
        awake = (x[:, :1] > 0).float()
        logits = self.head(x + awake * nn.functional.linear(x, self.layer.weight))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return type("Output", (), {"logits": logits, "loss": loss})()


@pytest.mark.parametrize("awake", [1, 5, 7], ids=["first batch", "later batch", "last batch"])
@pytest.mark.parametrize("twice", [False, True], ids=["one row", "two equal rows"])
def test_a_weight_used_past_its_layer_is_caught_in_whichever_row(awake: int, twice: bool) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    x[:, 0] = -1.0
    labels = torch.arange(8) % 3
    x[awake, 0] = 1.0
    if twice:
        x[awake - 1], labels[awake - 1] = x[awake], labels[awake]
    model, batch = PastTheLayer(), {"x": x, "labels": labels}
    reference = reference_fisher(model, batch)
    assert reference["layer.weight"].any()
    with pytest.warns(FishTuningWarning, match=r"1 of 3 tensors, e\.g\. 'layer\.weight': its rule does not agree"):
        assert_scores_close(scored(model, rebatch(batch, 2)), reference)


# With the default start, the tensors of dt_proj, which no layer of their own multiplies with, have next to no gradient.
@pytest.mark.parametrize("start", [0.3, 0.1])
@pytest.mark.parametrize("lengths", [(5, 9, 3, 7), (2, 9, 9, 9)])
def test_mamba(lengths: tuple[int, ...], start: float) -> None:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4, intermediate_size=32, time_step_rank=2,
        pad_token_id=0, initializer_range=start,
    )  # fmt: skip
    model, batch = MambaForCausalLM(config).eval(), causal_batch(lengths)
    loader = rebatch(batch, 2)
    assert_scores_close(scored(model, loader), scored(model, loader, method="loop"))


def passes(model: nn.Module, loader: list[Batch]) -> list[int]:
    """How many examples each forward pass of a scoring has."""
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        scored(model, loader)
    handle.remove()
    return sizes


def test_one_example_alone_proves_the_rules_of_lora() -> None:
    assert passes(lora(bert()), rebatch(classification_batch((9,) * 8), 4)) == [1, 4, 4]


def test_two_do_where_there_is_padding() -> None:
    assert passes(lora(bert()), rebatch(classification_batch((5, 9, 3, 7) * 2), 4)) == [1, 1, 4, 4]


def test_factors_without_any_gradient_stay_with_their_rules() -> None:
    # B = 0: no example ever gives A a gradient, and none needs to be looked at alone for it again.
    model, batch = lora(bert(), init_lora_weights=True), classification_batch((5, 9, 3, 7) * 2)
    assert passes(model, rebatch(batch, 4)) == [1, 1, 4, 4]
    scores = scored(model, rebatch(batch, 4))
    assert all(bool(score.any()) != ("lora_A" in name) for name, score in scores.items())
    assert_scores_close(scores, reference_fisher(model, batch))


@pytest.mark.parametrize("fisher_type", ["empirical", "expected"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_weighted_passes_give_the_same_scores(
    dtype: torch.dtype, tolerance: float, checkpointing: bool, fisher_type: str
) -> None:
    model, loader = lora(bert(), init_lora_weights=True).to(dtype), rebatch(classification_batch(), 2)
    by_loop = scored(model, loader, method="loop", fisher_type=fisher_type)
    if checkpointing:
        model.train().activation_checkpointing_enable()
    assert_scores_close(scored(model, loader, fisher_type=fisher_type), by_loop, tolerance)


class OfWords(nn.Module):
    loss_type = "ForSequenceClassification"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.layer, self.head = nn.Embedding(40, 6), nn.Linear(6, 6), nn.Linear(6, 3)


class Gated(PastTheLayer):
    """The same rows, but the layer is called: its rule is right."""

    share = 1.0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> object:
        logits = self.head(x + self.share * (x[:, :1] > 0).to(x.dtype) * self.layer(x).tanh())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return type("Output", (), {"logits": logits, "loss": loss})()


class Hardly(Gated):
    """The layer counts for next to nothing, as the biases of keys do in attention, whose gradients are all rounding."""

    share = 1e-6


@pytest.mark.parametrize(
    ("kind", "passes"),
    [(Gated, [1, 2, 2, 1, 1, 2, 2]), (Hardly, [1, 2, 2, 2, 2])],
    ids=["a gradient has its batch's examples looked at alone, none after it", "what may be rounding does not"],
)
def test_a_right_rule_is_proven_by_the_first_batch_that_has_a_gradient(kind: type[Gated], passes: list[int]) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    x[:, 0] = -1.0
    x[3, 0] = 1.0
    model, batch, sizes = kind(), {"x": x, "labels": torch.arange(8) % 3}, []
    reference = reference_fisher(model, batch)
    assert reference["layer.weight"].any()
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(kwargs["x"])), with_kwargs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        assert_scores_close(scored(model, rebatch(batch, 2)), reference)
    assert sizes == passes


def test_in_16_bits_the_batch_is_done_again_with_other_weights() -> None:
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[:, 0] = -1.0
    x[5, 0] = 1.0
    model, batch, sizes = Gated().bfloat16(), {"x": x, "labels": torch.arange(12) % 3}, []
    by_loop = scored(model, rebatch(batch, 4), method="loop")
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(kwargs["x"])), with_kwargs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        assert_scores_close(scored(model, rebatch(batch, 4)), by_loop, 0.03)
    # A pair of rows for one loss and for both, the one by itself, the batch; the second batch once more.
    assert sizes == [2, 1, 2, 4, 4, 4, 4]


class Shuffled(Gated):
    """The layer has the batch's rows in another order, which autograd's graph does not tell, where any is awake."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> object:
        awake = (x[:, :1] > 0).to(x.dtype)
        steps = int(awake.any())
        logits = self.head(x + awake * self.layer(x.roll(steps, 0)).roll(-steps, 0).tanh())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return type("Output", (), {"logits": logits, "loss": loss})()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_weights_tell_rows_that_are_not_in_order(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[:, 0] = -1.0
    x[4:8, 0] = torch.tensor([1.0, -1.0, 1.0, 1.0])
    model, batch = Shuffled().to(dtype), {"x": x, "labels": torch.arange(12) % 3}
    loader = rebatch(batch, 4)
    with caplog.at_level("INFO", "fish_tuning"):
        scores = scored(model, loader)
    assert "layer.weight: its rule does not agree" in caplog.text
    assert_scores_close(scores, scored(model, loader, method="loop"), 1e-5 if dtype == torch.float32 else 0.02)


def exchanged(words: Tensor) -> Tensor:
    """(n, P, ...) or (n * P, ...) as the latter, with the first tokens of two examples in each other's place.

    By a product, since autograd's graph would tell it of an index.
    """
    rows = words.reshape(-1, words.shape[-1])
    order = torch.arange(len(rows))
    if len(rows) >= 18:
        order[[0, 9]] = order[[9, 0]]
    return nn.functional.one_hot(order).to(rows.dtype) @ rows


class Exchanging(OfWords):
    """The layer has the first tokens of two examples exchanged, where they tell little."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
        words = self.words(input_ids)
        size, length, width = words.shape
        mixed = exchanged(self.layer(exchanged(words)).tanh()).view(size, length, width)
        weight = torch.ones(length, dtype=words.dtype)
        weight[0] = 0.5
        return type("Output", (), {"logits": self.head((mixed * weight[:, None]).sum(1))})()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_few_tokens_in_another_example_are_told(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = Exchanging().to(dtype), classification_batch((9, 9, 9, 9))
    with caplog.at_level("INFO", "fish_tuning"):
        scores = scored(model, batch)
    assert "layer.weight: its rule does not agree" in caplog.text
    assert_scores_close(scores, scored(model, batch, method="loop"), 0.02)


def test_a_rule_that_fails_after_a_batch_of_one_example_takes_nothing_back() -> None:
    """A single example needs no rule; the totals hold it when a rule is found wrong in the batch after it."""
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    x[:, 0] = 1.0
    model, batch = PastTheLayer(), {"x": x, "labels": torch.arange(5) % 3}
    batches = [{key: value[:1] for key, value in batch.items()}, {key: value[1:] for key, value in batch.items()}]
    with pytest.warns(FishTuningWarning, match="does not agree"):
        assert_scores_close(scored(model, batches), reference_fisher(model, batch))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU is the faster the more it is given at once")
def test_few_long_rows_are_scored_one_at_a_time() -> None:
    torch.manual_seed(0)
    model = bert(max_position_embeddings=600)
    ids = torch.randint(5, 30, (2, 520))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1])}
    sizes = passes(model, [batch])
    assert sizes == [1, 1]


def test_rounding_in_16_bits_is_no_disagreement(caplog: pytest.LogCaptureFixture) -> None:
    """A row's small gradients differ by more than any tolerance when it is computed in a batch of another shape."""
    settings = {"num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 64}
    model = lora(llama(**settings)).to(torch.bfloat16)
    with caplog.at_level("INFO", "fish_tuning"), warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        scored(model, causal_batch((40, 25, 33, 12)))
    assert "done again" not in caplog.text
    assert "by the loop" not in caplog.text


@pytest.mark.parametrize("seed", [0, 4, 7])
def test_a_label_that_rounding_draws_otherwise_is_no_padding_that_matters(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 64}
    model = lora(llama(seed=seed, **settings), lora_dropout=0.0).to(torch.bfloat16)
    with caplog.at_level("INFO", "fish_tuning"), warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        scored(model, causal_batch((30, 12, 25, 9)), fisher_type="sampled")
    assert "by the loop" not in caplog.text


class ByWidth(nn.Module):
    """Its loss depends on how far its batch is padded."""

    loss_type = "ForSequenceClassification"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(40, 6), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
        return type("Output", (), {"logits": self.head(self.words(input_ids).mean(1)) * input_ids.shape[1]})()


class ReadsPadding(ByWidth):
    """A row's words are mixed with its padding: that tells in gradients by far more than in losses near the start."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(6, 6, 5, padding=2)
        self.head.requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
        mixed = self.mix(self.words(input_ids).transpose(1, 2)).tanh().transpose(1, 2) * attention_mask[..., None]
        return type("Output", (), {"logits": 0.01 * self.head(mixed.sum(1) / attention_mask.sum(1, keepdim=True))})()


@pytest.mark.parametrize("model_of", [ByWidth, ReadsPadding])
def test_in_16_bits_what_depends_on_padding_goes_to_the_loop(model_of: type[ByWidth]) -> None:
    model, batch = model_of().to(torch.bfloat16), classification_batch((9, 3, 2, 9))
    with pytest.warns(FishTuningWarning, match="another gradient by itself, without its padding"):
        scores = scored(model, batch)
    assert_scores_close(scores, scored(model, batch, method="loop"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_of", [ByWidth, ReadsPadding])
def test_padding_is_looked_at_where_it_first_comes(model_of: type[ByWidth], dtype: torch.dtype) -> None:
    """The rows of the first batch are of one length, and prove nothing of those that are padded."""
    model = model_of().to(dtype)
    batches = [classification_batch((9, 9, 9, 9)), classification_batch((9, 3, 2, 9))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FishTuningWarning)
        scores = scored(model, batches)
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    assert_scores_close(scores, scored(model, batches, method="loop"), tolerance)


def test_a_later_batch_that_is_padded_is_proven_once_more() -> None:
    even, padded = classification_batch((9, 9, 9, 9)), classification_batch((9, 3, 2, 9))
    model = lora(bert())
    assert passes(model, [even, even, padded, padded]) == [1, 4, 4, 1, 1, 4, 4]
    assert passes(model, [padded, even, padded]) == [1, 1, 4, 4, 4]


def test_what_never_had_a_rule_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = PastTheLayer(), {"x": torch.randn(4, 6), "labels": torch.arange(4) % 3}
    model.layer.bias = model.head.bias  # a tensor of two layers
    with caplog.at_level("INFO", "fish_tuning"), warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        scored(model, batch)
    assert "1 tensors by the loop (no rule)" in caplog.text


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((6,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Scaled(PastTheLayer):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Scale()  # type: ignore[assignment]

    def forward(self, x: Tensor, labels: Tensor | None = None) -> object:
        logits = self.head(self.layer(x).tanh())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return type("Output", (), {"logits": logits, "loss": loss})()


@pytest.mark.parametrize("factor", [1.0, 1.01], ids=["right", "wrong"])
def test_a_rule_of_the_users_own(
    factor: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fish_tuning.scores.layer_rules._RULES", dict(_RULES))

    @register_rule(Scale)
    def scale(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        return {"weight": factor * (x * g).sum(1)}

    batch = {"x": torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), "labels": torch.arange(4) % 3}
    with caplog.at_level("INFO", "fish_tuning"), warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        assert_scores_close(scored(Scaled(), batch), reference_fisher(Scaled(), batch))
    assert ("a module is done again" in caplog.text) == (factor != 1)
    assert any(issubclass(warning.category, FishTuningWarning) for warning in given) == (factor != 1)


def test_the_warning_points_at_the_callers_line() -> None:
    batch = {"x": torch.ones(4, 6), "labels": torch.arange(4) % 3}
    with pytest.warns(FishTuningWarning) as given:
        calculate_fisher_information(PastTheLayer(), [batch], progress=False)
    assert {warning.filename for warning in given if warning.category is FishTuningWarning} == {__file__}


class Shifted(nn.Embedding):
    """Reads other rows than those it is asked for."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 1)


class OfATable(nn.Module):
    loss_type = "ForSequenceClassification"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = Shifted(5000, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> object:
        logits = self.head(self.table(input_ids).mean(1).tanh())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return type("Output", (), {"logits": logits, "loss": loss})()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 40, 4000])
def test_the_next_row_of_a_large_table_is_another(first: int, dtype: torch.dtype) -> None:
    ids = torch.randint(first, first + 40, (4, 6), generator=torch.Generator().manual_seed(0))
    model, batch = OfATable().to(dtype), {"input_ids": ids, "labels": torch.arange(4) % 3}
    by_loop = scored(model, batch, method="loop")["table.weight"]
    found = scored(model, batch)["table.weight"]
    assert float((found - by_loop).norm()) < (1e-5 if dtype == torch.float32 else 0.1) * float(by_loop.norm())


class Counting(nn.Embedding):
    """Reads the rows of positions, of whatever it is given."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.arange(ids.shape[1]).expand(len(ids), -1))


class OfAPosition(OfATable):
    """Of one position alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Counting(50, 8)  # type: ignore[assignment]

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> object:
        logits = self.head(self.table(input_ids)[:, 3].tanh())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return type("Output", (), {"logits": logits, "loss": loss})()


def test_ids_that_happen_to_be_positions_prove_nothing() -> None:
    """In the row that is looked at alone, the one position that has a gradient is its own id."""
    ids = torch.tensor([[9, 8, 7, 3], [9, 8, 7, 6], [9, 8, 7, 5]])
    model, batch = OfAPosition(), {"input_ids": ids, "labels": torch.tensor([0, 1, 2])}
    assert_scores_close(scored(model, batch), scored(model, batch, method="loop"))


class Grouped(nn.Linear):
    """Two groups of inputs, each with its half of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(x.chunk(2, -1), self.weight.chunk(2, 0), strict=True)
        return sum(nn.functional.linear(part, weight) for part, weight in parts)  # type: ignore[return-value]


def test_a_weight_that_is_used_in_another_shape_has_no_rule() -> None:
    model = PastTheLayer()
    model.layer = Grouped(3, 6, bias=False)
    model.forward = lambda x, labels=None: Scaled.forward(model, x, labels)  # type: ignore[assignment, arg-type]
    batch = {"x": torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), "labels": torch.arange(4) % 3}
    model.head = nn.Linear(3, 3)
    assert_scores_close(scored(model, batch), scored(model, batch, method="loop"))
