"""A row of positions for each example: where a model cannot take that, and what is no sign of it."""

from __future__ import annotations

import pytest
import torch
from tiny import Batch, assert_scores_close, bert, classification_batch, reference_fisher
from torch import Tensor, nn

from fish_tuning import FishTuningWarning, calculate_fisher_information


class Positions(nn.Module):
    """A classifier that may repeat its one row of positions by itself, and may fail."""

    loss_type = "ForSequenceClassification"

    def __init__(self, repeats: bool = False, failures: int = 0, error: Exception | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.positions, self.head = nn.Embedding(40, 6), nn.Embedding(16, 6), nn.Linear(6, 3)
        self.repeats, self.failures, self.error, self.calls = repeats, failures, error, 0

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Tensor) -> object:
        self.calls += 1
        places = self.positions(torch.arange(input_ids.shape[1])[None])
        if self.failures and len(input_ids) > 1 and self.error:
            self.failures -= 1
            raise self.error
        if self.repeats:
            places = places.repeat(len(input_ids), 1, 1)
        logits = self.head((self.words(input_ids) + places).tanh().mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return type("Output", (), {"logits": logits, "loss": loss})()


def batch() -> Batch:
    ids = torch.randint(40, (4, 5), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": torch.arange(4) % 3}


def scored(model: nn.Module) -> dict[str, Tensor]:
    return calculate_fisher_information(model, [batch()], progress=False)


def test_a_row_for_each_example() -> None:
    assert_scores_close(scored(Positions()), reference_fisher(Positions(), batch()))


def test_a_model_that_repeats_its_row_has_it_looped() -> None:
    with pytest.warns(FishTuningWarning, match=r"1 of 4 tensors, e\.g\. 'positions\.weight': it was called with first"):
        scores = scored(Positions(repeats=True))
    assert_scores_close(scores, reference_fisher(Positions(), batch()))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory"),
    ],
    ids=["cuda", "cpu", "mps"],
)
def test_out_of_memory_is_raised_at_once(error: Exception) -> None:
    model = Positions(failures=1, error=error)
    with pytest.raises(type(error)) as raised:
        scored(model)
    assert raised.value is error
    assert model.calls == 2  # one example alone, the batch


@pytest.mark.parametrize("failures", [1, 99], ids=["once", "always"])
@pytest.mark.parametrize("error", [RuntimeError("device lost"), ValueError("bad ids")], ids=["runtime", "value"])
def test_an_error_that_is_none_of_the_expansion_is_raised_as_it_came(error: Exception, failures: int) -> None:
    with pytest.raises(type(error)) as raised:
        scored(Positions(failures=failures, error=error))
    assert raised.value is error


def test_an_error_without_any_expansion_is_raised_as_it_came() -> None:
    model, error = bert(), RuntimeError("device lost")
    model.bert.embeddings.position_embeddings.requires_grad_(False)

    def fail(*_: object) -> None:
        raise error

    model.classifier.register_forward_hook(fail)
    with pytest.raises(RuntimeError) as raised:
        calculate_fisher_information(model, [classification_batch()], progress=False)
    assert raised.value is error
