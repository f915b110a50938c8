"""Buffers that forward passes change are put back; what would be broken by that is left alone."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import causal_batch, llama, lora, rebatch
from torch import Tensor, nn

from fish_tuning import calculate_fisher_information
from fish_tuning.scores import buffers
from fish_tuning.scores.buffers import buffers_kept

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


class Counts(nn.Module):
    """Counts in place, by assignment and past autograd's versions, and normalizes by its batch whatever its mode."""

    loss_type = "ForSequenceClassification"
    seen: Tensor
    calls: Tensor
    past: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.head, self.norm = nn.Linear(5, 3), nn.BatchNorm1d(5)
        for name in ("seen", "calls", "past"):
            self.register_buffer(name, torch.zeros(()))
        self.told = 0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        self.seen += len(x)
        self.calls = self.calls + 1
        self.told += 1
        self.past.data.add_(1)
        self.norm.train()
        self.norm(torch.cat([x, x + 1]))
        return SimpleNamespace(logits=self.head(x))


@pytest.mark.parametrize("method", ["auto", "loop"])
def test_what_passes_write_is_put_back(method: Any) -> None:
    model = Counts()
    model(X)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    same = dict(model.named_buffers())
    versions = [buffer._version for buffer in (model.past, *model.norm.buffers())]
    calculate_fisher_information(model, [{"x": X, "labels": torch.arange(4) % 3}], method=method, progress=False)
    assert all(buffer is same[name] for name, buffer in model.named_buffers())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.told == 1
    assert model.past._version == versions[0]


def fail() -> None:
    raise ValueError("of a pass")


def test_after_an_error_too() -> None:
    model = Counts()
    model.head.register_forward_pre_hook(lambda *_: fail())
    batch = {"x": X, "labels": torch.arange(4) % 3}
    with pytest.raises(ValueError, match="of a pass"):
        calculate_fisher_information(model, [batch], progress=False)
    assert not model.seen
    assert not model.calls


def test_frequencies_that_grow_with_the_text_are_as_they_were() -> None:
    model = llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, max_position_embeddings=6)
    rotary: Any = model.model.rotary_emb
    before, cached = rotary.inv_freq.clone(), rotary.max_seq_len_cached
    batch = causal_batch((9, 9, 9, 9))
    expected = model(**batch).logits
    assert rotary.max_seq_len_cached > cached  # a pass changes them
    with buffers_kept(model):
        model(**causal_batch((14, 14)))
    assert torch.equal(model(**batch).logits, expected)
    fresh = lora(llama(rope_parameters=model.config.rope_parameters, max_position_embeddings=6))
    calculate_fisher_information(fresh, rebatch(batch, 2), progress=False)
    rotary = fresh.base_model.model.model.rotary_emb
    assert torch.equal(rotary.inv_freq, before)
    assert rotary.max_seq_len_cached == cached


class Grows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(2))
        self.register_buffer("rows", torch.zeros(1).expand(3))
        self.register_buffer("nowhere", torch.zeros(3, device="meta"))
        self.register_buffer("none", None)
        self.register_buffer("packed", torch.zeros(4))


def test_what_others_may_go_by_is_left() -> None:
    model = Grows()
    with buffers_kept(model):
        model.table = torch.zeros(5)
        model.packed = torch.zeros(2, dtype=torch.int32)
        model.none = torch.ones(1)
        model.nowhere = torch.ones(3)
        model.register_buffer("new", torch.ones(2))
    assert [len(buffer) for buffer in model.buffers()] == [5, 3, 3, 1, 2, 2]


def test_large_ones_are_not_copied_but_told_where_they_are_written_to(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(buffers, "COPIED", 12)
    model = Grows()
    with caplog.at_level(logging.WARNING), buffers_kept(model):
        model.table.add_(1)  # type: ignore[operator]
    assert not caplog.messages
    assert not model.table.any()  # type: ignore[operator]
    with caplog.at_level(logging.WARNING), buffers_kept(model):
        model.packed.add_(1)  # type: ignore[operator]
    assert "1 buffers that are too large to be copied, e.g. 'packed'" in caplog.messages[0]
