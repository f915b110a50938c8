"""Where a user has lowered the precision of fp32 products, the proof of the rules is done in full precision."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
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
    reference_fisher,
    vit,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fish_tuning import FishTuningWarning, calculate_fisher_information, measure_moments, register_rule
from fish_tuning.scores import scorer
from fish_tuning.scores.layer_rules import _RULES
from fish_tuning.scores.precision import _Convolutions, _Matmul, full_precision

if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    pytest.skip("torch before 2.9 has other names for what is set and looked at here", allow_module_level=True)

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
CONVOLUTIONS = {"convolution", "convolution_backward"}
SETTINGS = {
    "cuda.matmul": torch.backends.cuda.matmul,
    "cudnn.conv": torch.backends.cudnn.conv,
    "cudnn.rnn": torch.backends.cudnn.rnn,
    "mkldnn.matmul": torch.backends.mkldnn.matmul,
    "mkldnn.conv": torch.backends.mkldnn.conv,
    "mkldnn.rnn": torch.backends.mkldnn.rnn,
}


def rounded(tensor: Tensor) -> Tensor:
    """To 10 bits behind the point, as TF32 takes its inputs; ties to even."""
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32).reshape(tensor.shape)


class Tf32(TorchDispatchMode):
    """fp32 products as an Ampere GPU does them: in TF32 where torch's settings for CUDA allow it."""

    lowered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        allowed = (name in PRODUCTS and torch.backends.cuda.matmul.fp32_precision == "tf32") or (
            name in CONVOLUTIONS and torch.backends.cudnn.conv.fp32_precision == "tf32"
        )
        if allowed:
            self.lowered += 1
            args = [rounded(a) if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in args]
        return func(*args, **(kwargs or {}))


def precisions() -> dict[str, str]:
    return {name: setting.fp32_precision for name, setting in SETTINGS.items()}


@pytest.fixture(autouse=True)
def _settings_are_put_back() -> Iterator[None]:
    before = precisions()
    yield
    for name, was in before.items():
        SETTINGS[name].fp32_precision = "none"
        if SETTINGS[name].fp32_precision != was:
            SETTINGS[name].fp32_precision = was
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture
def refused(caplog: pytest.LogCaptureFixture) -> Any:
    """`refused(model, loader)`: what is said of rules that failed, those whose module was done again for it, too."""

    def refused(model: nn.Module, loader: list[dict[str, Tensor]], measure: Any = calculate_fisher_information) -> Any:
        caplog.clear()
        with warnings.catch_warnings(record=True) as told, caplog.at_level(logging.INFO, "fish_tuning.scores.fisher"):
            warnings.simplefilter("always", FishTuningWarning)
            measure(model, loader, progress=False)
        moved = [record.getMessage() for record in caplog.records if "done again for it" in record.getMessage()]
        return [*moved, *(str(each.message) for each in told if issubclass(each.category, FishTuningWarning))]

    return refused


def deep_vit() -> nn.Module:
    return vit(num_hidden_layers=6, hidden_size=64)


def wide_bert() -> nn.Module:
    return bert(hidden_size=128, intermediate_size=256)


def long_batch() -> dict[str, Tensor]:
    return classification_batch((30, 28, 12, 31))


@pytest.mark.parametrize("measure", [calculate_fisher_information, measure_moments])
@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (bert, classification_batch),
        (lambda: lora(bert(), init_lora_weights=True), classification_batch),
        (llama, causal_batch),
        (deep_vit, image_batch),
    ],
    ids=["bert", "lora at its start", "llama", "vit"],
)
def test_no_rule_is_refused_in_tf32(model: Any, batch: Any, measure: Any, refused: Any) -> None:
    torch.set_float32_matmul_precision("high")
    with Tf32():
        assert refused(model(), [batch()] * 2, measure) == []


def test_a_proof_in_tf32_would_refuse_right_rules(monkeypatch: pytest.MonkeyPatch, refused: Any) -> None:
    torch.set_float32_matmul_precision("high")
    monkeypatch.setattr(scorer, "full_precision", nullcontext)
    with Tf32():
        assert refused(deep_vit(), [image_batch()])


def test_once_proven_rules_score_as_the_user_asked() -> None:
    model, batch = lora(bert()), classification_batch()
    reference = reference_fisher(model, batch)
    torch.set_float32_matmul_precision("high")
    with Tf32() as products:
        once = calculate_fisher_information(model, [batch], progress=False)
    assert not products.lowered
    assert_scores_close(once, reference)
    with Tf32() as products:
        twice = calculate_fisher_information(model, [batch, batch], progress=False)
    assert products.lowered
    assert_scores_close(twice, reference, tolerance=0.02)


class Scaled(nn.Linear):
    """A linear layer with a rule that is wrong by one part in a hundred."""


@pytest.fixture
def wrong_rule() -> Iterator[None]:
    @register_rule(Scaled)
    def scaled(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        return {"weight": 1.01 * torch.einsum("npo,npi->noi", g, x)}

    yield
    del _RULES[Scaled]


@pytest.mark.usefixtures("wrong_rule")
def test_a_wrong_rule_is_refused_in_tf32(refused: Any) -> None:
    torch.set_float32_matmul_precision("high")
    model = bert()
    model.classifier = Scaled(16, 3, bias=False).to(DEVICE)
    with Tf32():
        told = refused(model, [classification_batch()])
    assert told
    assert all("classifier.weight" in message for message in told)


def test_no_rule_is_refused_in_bf16_products_of_this_cpu(monkeypatch: pytest.MonkeyPatch, refused: Any) -> None:
    torch.set_float32_matmul_precision("medium")
    square = torch.randn(256, 256)
    if (square @ square - (square.double() @ square.double()).float()).abs().max() < 1e-2:
        pytest.skip("this CPU has no bf16 products to put in the place of fp32's")
    assert refused(wide_bert(), [long_batch()]) == []
    monkeypatch.setattr(scorer, "full_precision", nullcontext)
    assert refused(wide_bert(), [long_batch()])


def _high() -> None:
    torch.set_float32_matmul_precision("high")


def _older_name() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def _newer_name() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def _nothing() -> None:
    pass


@pytest.mark.parametrize("set_up", [_nothing, _high, _older_name, _newer_name])
def test_settings_are_full_meanwhile_and_back_afterwards(set_up: Any) -> None:
    set_up()
    before = precisions()
    with full_precision():
        assert set(precisions().values()) <= {"ieee", "none"}
    assert precisions() == before
    failing = full_precision()
    failing.__enter__()
    assert not failing.__exit__(ValueError, ValueError("in the block"), None)
    assert precisions() == before
    if set_up is _older_name:
        assert torch.backends.cuda.matmul.allow_tf32


def test_a_setting_that_went_by_the_one_above_it_still_does() -> None:
    settings = torch.backends.mkldnn
    settings.fp32_precision = "bf16"
    try:
        with full_precision():
            assert settings.matmul.fp32_precision == "ieee"
        settings.fp32_precision = "ieee"
        assert settings.matmul.fp32_precision == "ieee"
    finally:
        settings.fp32_precision = "none"


def test_the_older_names_of_torch() -> None:
    torch.set_float32_matmul_precision("high")
    matmul, convolutions = _Matmul(), _Convolutions()
    assert (matmul.fp32_precision, convolutions.fp32_precision) == ("high", "tf32")
    matmul.fp32_precision = convolutions.fp32_precision = "ieee"
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32
    matmul.fp32_precision, convolutions.fp32_precision = "high", "tf32"
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cudnn.allow_tf32
