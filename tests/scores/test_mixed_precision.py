"""An autocast around the call is put around each forward pass, and nothing else."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device import DEVICE
from tiny import (
    assert_scores_close,
    bert,
    causal_batch,
    classification_batch,
    image_batch,
    llama,
    lora,
    rebatch,
    relative_differences,
    vit,
)
from torch import Tensor, nn

from fish_tuning import FishTuningWarning, calculate_fisher_information, measure_moments
from fish_tuning.devices import multiplies_bf16
from fish_tuning.scores.example_gradients import OuterProducts
from fish_tuning.scores.mixed_precision import Autocast
from fish_tuning.scores.scoring_state import scoring_state

AUTOCAST = DEVICE.type, torch.bfloat16


def scored(model: nn.Module, batches: list[dict[str, Tensor]], **options: Any) -> dict[str, Tensor]:
    """Where a rule that fails, and so a tensor that is looped, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FishTuningWarning)
        return calculate_fisher_information(model, batches, warmup_steps=0, progress=False, **options)


class Untied(nn.Module):
    """A table that embeds and multiplies, a convolution without a rule, and a part that asks for fp32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv = nn.Embedding(40, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.out = nn.Linear(8, 40, bias=False)
        self.out.weight = self.embed.weight
        self.head = nn.Linear(40, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2).tanh()
        with torch.autocast(x.device.type, enabled=False):
            x = self.out(x.float()).tanh()
        mask = attention_mask[..., None].to(x)
        return self.head((x * mask).sum(1) / mask.sum(1))  # type: ignore[no-any-return]


def losses_of_untied(outputs: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs.float(), batch["labels"], reduction="none")


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, Any]]] = {
    "bert": (bert, classification_batch, {}),
    "lora": (lambda: lora(bert()), classification_batch, {}),
    "lora at its start": (lambda: lora(bert(), init_lora_weights=True), classification_batch, {}),
    "dora": (lambda: lora(llama(), use_dora=True), causal_batch, {}),
    "llama": (lambda: lora(llama()), lambda: causal_batch(side="left"), {}),
    "llama whole": (llama, causal_batch, {}),
    "vit": (lambda: lora(vit()), image_batch, {}),
    "expected": (lambda: lora(bert()), classification_batch, {"fisher_type": "expected"}),
    "tied and recomputed": (Untied, lambda: classification_batch((9, 9, 9, 9)), {"loss_fn": losses_of_untied}),
}


@pytest.mark.parametrize("name", CASES)
def test_rules_give_what_the_loop_gives(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, batch, options = CASES[name]
    model, batches = make().to(DEVICE), rebatch(batch(), 4)
    exact = scored(model, batches, **options)
    with torch.autocast(*AUTOCAST):
        with caplog.at_level(logging.INFO, "fish_tuning.scores.fisher"):
            batched = scored(model, batches, **options)
        assert not any("by the loop" in record.getMessage() for record in caplog.records)
        loop = scored(model, batches, method="loop", **options)
    # The gradient of the keys' bias is zero but for rounding, which another kernel does otherwise.
    exact, batched, loop = (
        {name: score for name, score in scores.items() if "key.bias" not in name} for scores in (exact, batched, loop)
    )
    assert_scores_close(batched, loop, tolerance=0.1)
    assert_scores_close(batched, exact, tolerance=0.3)
    assert max(relative_differences(batched, exact).values()) > 1e-4, "nothing was computed in 16 bits"


@pytest.mark.parametrize(
    ("dtype", "autocast", "expected"),
    [
        (torch.float32, None, {torch.float32}),
        (torch.float32, torch.bfloat16, {torch.bfloat16, torch.float32}),  # the pooler's tanh gives fp32 to the head
        (torch.bfloat16, None, {torch.bfloat16}),
        (torch.float16, None, {torch.float32}),  # beyond its range
    ],
)
@pytest.mark.parametrize("able", [True, False], ids=["bf16", "no bf16"])
def test_products_of_bf16_are_made_in_bf16(
    able: bool,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    expected: set[torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, squares = [], OuterProducts.squares

    def noted(self: OuterProducts) -> Tensor:
        made.append(self.dtype)
        assert self.g.dtype == self.x.dtype == torch.float32
        return squares(self)

    monkeypatch.setattr(OuterProducts, "squares", noted)
    monkeypatch.setattr("fish_tuning.scores.watched_layers.multiplies_bf16", lambda device: able)
    model, batch = lora(bert()).to(DEVICE, dtype), classification_batch()
    with torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
        scored(model, [batch])
    expected = expected if able else {torch.float32}
    assert set(made) <= expected
    assert torch.bfloat16 not in expected or torch.bfloat16 in made


def test_who_multiplies_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported in (True, False):
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda supported=supported: supported, raising=False)
        assert multiplies_bf16(torch.device("cpu")) is supported
        assert multiplies_bf16(torch.device("cuda"))
    monkeypatch.delattr("torch.cpu._is_avx512_bf16_supported")  # another version of torch
    assert not multiplies_bf16(torch.device("cpu"))


@pytest.mark.parametrize("large", [2**17, 0], ids=["many-at-once", "one-by-one"])
@pytest.mark.parametrize("entries", [2**22, 40])
def test_squares_of_products_in_bf16(entries: int, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As autograd has them: each gradient rounded once, the squares added up in fp32."""
    monkeypatch.setattr("fish_tuning.scores.example_gradients.CHUNK_ENTRIES", entries)
    monkeypatch.setattr("fish_tuning.scores.example_gradients._LARGE", large)
    monkeypatch.setattr("fish_tuning.scores.example_gradients._LARGE_ON_GPU", large)
    g, x = torch.randn(5, 7, 6).bfloat16().float(), torch.randn(5, 7, 8).bfloat16().float()
    each = torch.einsum("npo,npi->noi", g, x)
    rounded = each.bfloat16().float().square().sum(0)
    found = OuterProducts(g, x, torch.bfloat16).squares()
    torch.testing.assert_close(found, rounded, rtol=1e-3, atol=1e-3)
    assert not torch.equal(OuterProducts(g, x).squares(), found)
    one = OuterProducts(g[:, :1], x[:, :1], torch.bfloat16).squares()
    torch.testing.assert_close(one, (g[:, 0, :, None] * x[:, 0, None]).square().sum(0))


def test_small_gradients_survive_fp16() -> None:
    model, batch = lora(bert()), classification_batch()
    batch = batch | {"labels": model(**{k: v for k, v in batch.items() if k != "labels"}).logits.argmax(-1)}
    exact = scored(model, [batch])
    with torch.autocast(DEVICE.type, torch.float16):
        assert_scores_close(scored(model, [batch]), exact, tolerance=0.1)


def test_warm_up_sees_its_own_steps() -> None:
    """A cast that is kept from step to step would leave B at zero to all that follows, and A without a gradient."""
    model, batches = lora(bert(), init_lora_weights=True), rebatch(classification_batch(), 4)
    start = {name: tensor.clone() for name, tensor in model.named_parameters() if "lora_A" in name}
    exact = measure_moments(model, batches, warmup_steps=4, progress=False)
    with torch.autocast(*AUTOCAST):
        moments = measure_moments(model, batches, warmup_steps=4, progress=False)
    for name, tensor in start.items():
        moved, to = moments.weights[name] - tensor, exact.weights[name] - tensor
        assert moved.any(), name
        assert (moved - to).norm() < 0.3 * to.norm()
        assert moments.mean_squares[name].any()


def test_an_autocast_is_on_for_forward_passes_alone() -> None:
    model, batch, on = lora(bert()), classification_batch(), []
    head = model.base_model.model.classifier
    head.register_forward_hook(lambda *_: on.append(("forward", torch.is_autocast_enabled(DEVICE.type))))
    head.register_full_backward_hook(lambda *_: on.append(("backward", torch.is_autocast_enabled(DEVICE.type))))
    with torch.autocast(*AUTOCAST):
        scored(model, rebatch(batch, 2))
        assert torch.is_autocast_enabled(DEVICE.type)
    assert set(on) == {("forward", True), ("backward", False)}
    on.clear()
    scored(model, rebatch(batch, 2))
    assert set(on) == {("forward", False), ("backward", False)}


def test_the_autocast_of_before_is_there_again() -> None:
    model = lora(bert())
    with torch.autocast(*AUTOCAST):
        autocast = Autocast(model)
        with scoring_state(model):
            assert not torch.is_autocast_enabled(DEVICE.type)
            with autocast.on():
                assert torch.get_autocast_dtype(DEVICE.type) is torch.bfloat16
                assert torch.is_autocast_enabled(DEVICE.type)
            assert not torch.is_autocast_enabled(DEVICE.type)
        assert torch.is_autocast_enabled(DEVICE.type)
    assert not Autocast(model).dtypes
