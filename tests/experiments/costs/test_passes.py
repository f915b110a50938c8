"""What is counted on tensors without memory, against the same step of a real model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from passes import arguments, faked, real_pass, shapes
from tiny import bert, causal_batch, classification_batch, image_batch, llama, lora, random_mask, vit

from fish_tuning import apply_mask
from fish_tuning.experiments.costs import repeated_layers
from fish_tuning.experiments.costs.arm_costs import spread
from fish_tuning.experiments.costs.fake_models import mask_fake
from fish_tuning.experiments.costs.live_bytes import LiveBytes
from fish_tuning.experiments.costs.repeated_layers import DEPTHS, Extrapolated, first_layers, of_all_layers
from fish_tuning.experiments.costs.training_pass import training_pass
from fish_tuning.files.sizes import Described

MODELS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, torch.Tensor]]]] = {
    "bert": (lambda **config: lora(bert(**config)), lambda: classification_batch((12, 9, 3, 7))),
    "llama": (lambda **config: lora(llama(**config)), lambda: causal_batch((24, 9, 3, 7))),
    "vit": (lambda **config: lora(vit(**config)), lambda: image_batch(8)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", [{}, {"bf16": True}, {"checkpoints": True}, {"bf16": True, "checkpoints": True}])
@pytest.mark.parametrize("share", [None, 0.3])
def test_the_peak_is_that_of_a_real_step(name: str, how: dict[str, bool], share: float | None) -> None:
    make, batch = MODELS[name]
    real, args = make(), arguments(**how)
    mask = None if share is None else random_mask(real, share, dense=["classifier"])
    model, mode, beside = faked(make(), mask)
    said = training_pass(model, mode, shapes(batch()), args, gpu=False, beside=beside)
    if mask is not None:
        apply_mask(real, mask)
    found = real_pass(real, batch(), args)
    assert found.peak() > 0
    for asked in (0.0, 0.5, 1.0):
        assert said.peak(asked) == pytest.approx(found.peak(asked), rel=0.1)
    gradients = sum(p.grad.nbytes for p in real.parameters() if p.grad is not None)
    assert found.now["gradients"] == gradients
    assert said.peak() >= gradients


def test_memory_that_is_let_go_does_not_count() -> None:
    with LiveBytes() as live:
        for _ in range(3):
            torch.zeros(100)
        kept = torch.zeros(10)
        view = kept[2:5]
    assert (live.now["activations"], live.peak()) == (40, 400)
    del kept
    assert live.now["activations"] == 40
    del view
    assert live.now["activations"] == 0


def test_tensors_of_before_do_not_count() -> None:
    weight = torch.zeros(100)
    with LiveBytes([weight]) as live:
        weight.view(10, 10).add_(1)
    assert live.peak() == 0


def test_all_gradients_are_there_while_they_are_accumulated() -> None:
    weight = torch.nn.Parameter(torch.zeros(100))
    live = LiveBytes([weight])
    live.of_gradients([weight])
    with live:
        (weight * 2).sum().backward()
    assert live.now["gradients"] == 400
    assert live.peak(1.0, beside=400) == live.most_activations + 400
    assert live.peak(0.5, beside=400) == live.most_activations + 200


@pytest.mark.parametrize("checkpoints", [False, True])
def test_few_layers_tell_of_many(checkpoints: bool) -> None:
    batch = shapes(causal_batch((24, 9)))
    deep = sum(DEPTHS) + 3
    model, mode, _ = faked(lora(llama(num_hidden_layers=deep)))
    said = training_pass(model, mode, batch, arguments(checkpoints=checkpoints), gpu=False)
    assert isinstance(said, Extrapolated)
    found = real_pass(lora(llama(num_hidden_layers=deep)), causal_batch((24, 9)), arguments(checkpoints=checkpoints))
    for share in (0.0, 0.3, 1.0):
        assert said.peak(share) == pytest.approx(found.peak(share), rel=0.01)
    assert said.most_activations == pytest.approx(found.most_activations, rel=0.01)


def test_few_masked_layers_tell_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, kept = shapes(causal_batch((24, 9))), 1009  # which no number of tensors divides

    def peaks() -> Any:
        model = lora(llama(num_hidden_layers=sum(DEPTHS) + 3))
        sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        model, mode, _ = faked(model)
        with mode:
            beside = mask_fake(model, spread(kept, sizes))
        return training_pass(model, mode, batch, arguments(), gpu=False, beside=beside)

    few = peaks()
    assert isinstance(few, Extrapolated)
    monkeypatch.setattr(repeated_layers, "like_layers", lambda model: None)
    whole = peaks()
    assert isinstance(whole, LiveBytes)
    assert few.peak() == pytest.approx(whole.peak(), rel=0.01)


def test_layers_that_are_not_on_a_line_are_all_run() -> None:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(20))
    runs = []

    def run() -> LiveBytes:
        number = len(model.layers)
        runs.append(number)
        with LiveBytes() as live:
            torch.zeros(100 * number**2)
        return live

    assert of_all_layers(model, run).peak() == 400 * 20**2
    assert runs == [*DEPTHS, 20]
    with first_layers(model.layers, 2):
        assert len(model.layers) == 2
    assert len(model.layers) == 20


def test_layers_that_differ_are_all_run() -> None:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Linear(2 + i, 2) for i in range(20))
    runs = []

    def run() -> LiveBytes:
        runs.append(len(model.layers))
        return LiveBytes()

    of_all_layers(model, run)
    assert runs == [20]


def test_a_gpus_kernels_keep_less() -> None:
    """Dropout keeps a byte an entry in the place of four, and attention no matrix of probabilities."""

    def peak(gpu: bool, **how: bool) -> int:
        model, mode, _ = faked(lora(bert(max_position_embeddings=256)))
        batch = {name: Described(torch.long, (4, 200)) for name in ("input_ids", "attention_mask")}
        batch["labels"] = Described(torch.long, (4,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return training_pass(model, mode, batch, arguments(**how), gpu=gpu).peak()

    probabilities = 2 * 4 * 2 * 200 * 200 * 4  # of two layers: examples, heads, tokens squared, bytes
    assert peak(gpu=False) - peak(gpu=True) > probabilities
    assert peak(gpu=True, checkpoints=True) < peak(gpu=True)
    assert peak(gpu=True, bf16=True) < peak(gpu=True)
