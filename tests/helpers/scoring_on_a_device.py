"""Scores on the pretend device beside those on the CPU, and what the device had to be waited for: JSON for the tests.

A process of its own, since torch takes the pretend device for its accelerator.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pretend_device
import torch
from tiny import Batch, bert, causal_batch, classification_batch, llama, lora, rebatch
from torch import nn

from fish_tuning import (
    FisherError,
    calculate_fisher_information,
    calculate_scores,
    create_mask_from_fisher,
    devices,
    measure_moments,
    start_along_gradient,
)
from fish_tuning.scores import reading

reading._WITHOUT_WAITING.add(pretend_device.DEVICE.type)  # as CUDA is
Measure = Callable[..., Any]


def own(counts: Counter[str]) -> Counter[str]:
    """What the package asked, without what transformers does to its masks."""
    return Counter({line: number for line, number in counts.items() if "/transformers/" not in line})


def measured(model: nn.Module, loader: list[Batch], measure: Measure, on_device: bool = False) -> dict[str, Any]:
    """Scores as lists, and the counts, of a model that is moved to the device; of batches that are, if so asked."""
    with pretend_device.Pretending() as device:
        device.has_float64 = devices.has_float64(pretend_device.DEVICE)
        model.to(pretend_device.DEVICE)
        if on_device:
            loader = [{key: value.to(pretend_device.DEVICE) for key, value in batch.items()} for batch in loader]
        device.counts.clear()
        scores = measure(model, loader)
        waits, copies = own(device.counts), device.copies.copy()
        return {
            "scores": {name: tensor.tolist() for name, tensor in scores.items()},
            "waits": waits,
            "copies": copies.total(),
        }


def beside_the_cpu(make: Callable[[], nn.Module], batch: Batch, measure: Measure, **kwargs: Any) -> dict[str, Any]:
    """Of two loaders, one of which has two batches more: the scores, and what these batches added."""
    few, many = [batch] * 2, [batch] * 4
    short, long = (measured(make(), loader, measure, **kwargs) for loader in (few, many))
    added = Counter(long["waits"])
    added.subtract(short["waits"])
    return {
        "scores": long["scores"],
        "cpu": {name: tensor.tolist() for name, tensor in measure(make(), many).items()},
        "waits": short["waits"].total(),
        "added": {line: number for line, number in added.items() if number},
        "copies": long["copies"] - short["copies"],
    }


def fisher(model: nn.Module, loader: list[Batch], **kwargs: Any) -> Any:
    return calculate_fisher_information(model, loader, progress=False, **kwargs)


def moments(model: nn.Module, loader: list[Batch]) -> Any:
    found = measure_moments(model, loader, progress=False)
    return {f"square of {name}": tensor for name, tensor in found.mean_squares.items()} | found.mean_gradients


def start(model: nn.Module, loader: list[Batch]) -> Any:
    start_along_gradient(model, loader, progress=False)
    return {name: parameter.detach() for name, parameter in model.named_parameters() if "lora_A" in name}


def error_of(model: nn.Module, loader: list[Batch], measure: Measure = fisher) -> str:
    try:
        measured(model, loader, measure)
    except FisherError as error:
        return str(error)
    return "none"


def broken_example(number: int) -> list[Batch]:
    """Batches of two, of which one example has a token whose embedding is not finite."""
    batch = classification_batch()
    batch["input_ids"][batch["input_ids"] == 39] = 38
    batch["input_ids"][number, 0] = 39
    return rebatch(batch, 2)


def broken_bert() -> nn.Module:
    model = lora(bert())
    model.get_parameter("base_model.model.bert.embeddings.word_embeddings.weight").data[39] = float("nan")
    return model


def wrong_label() -> list[Batch]:
    batch = classification_batch()
    batch["labels"][3] = 7
    return [classification_batch(), batch]


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "classes": lambda: beside_the_cpu(lambda: lora(bert()), classification_batch(), fisher),
    "padding on the left": lambda: beside_the_cpu(lambda: lora(llama()), causal_batch(side="left"), fisher),
    "few tokens count": lambda: beside_the_cpu(lambda: lora(llama()), causal_batch((8, 9, 7, 10), prompt=6), fisher),
    "drawn labels": lambda: beside_the_cpu(
        lambda: lora(llama()), causal_batch(prompt=2), lambda *given: fisher(*given, fisher_type="sampled")
    ),
    "mean gradients": lambda: beside_the_cpu(lambda: lora(bert()), classification_batch(), moments),
    "one at a time": lambda: beside_the_cpu(
        lambda: lora(bert()), classification_batch(), lambda *given: fisher(*given, method="loop")
    ),
    "warm-up": lambda: beside_the_cpu(lambda: lora(bert(), init_lora_weights=True), classification_batch(), fisher),
    "gain": lambda: beside_the_cpu(
        lambda: lora(bert()), classification_batch(), lambda *given: calculate_scores(*given, "gain", progress=False)
    ),
    "batches there": lambda: beside_the_cpu(lambda: lora(bert()), classification_batch(), fisher, on_device=True),
    "all weights": lambda: beside_the_cpu(bert, classification_batch(), fisher),
    "start": lambda: beside_the_cpu(lambda: lora(bert(), init_lora_weights=True), classification_batch(), start),
}


def mask(model: nn.Module, loader: list[Batch], **kwargs: Any) -> Any:
    return create_mask_from_fisher(fisher(model, loader), 0.3125, ["classifier"], **kwargs)


def exact_scores(model: nn.Module, loader: list[Batch], place: str | None = "cpu") -> Any:
    return fisher(model, loader, scores_dtype=torch.float64, scores_device=place)


def same_as_the_cpu(make: Callable[[], nn.Module], measure: Measure) -> dict[str, Any]:
    loader = [classification_batch()]
    on_cpu = measure(make(), loader)
    return {
        "scores": measured(make(), loader, measure)["scores"],
        "cpu": {name: tensor.tolist() for name, tensor in on_cpu.items()},
    }


WITHOUT_FLOAT64: dict[str, Callable[[], dict[str, Any]]] = {
    "mean gradients": lambda: same_as_the_cpu(lambda: lora(bert(), init_lora_weights=True), moments),
    "all weights": lambda: same_as_the_cpu(bert, fisher),
    "entries": lambda: same_as_the_cpu(lambda: lora(bert()), lambda *given: mask(*given, normalize="module_type")),
    "components": lambda: same_as_the_cpu(lambda: lora(bert()), lambda *given: mask(*given, granularity="component")),
    "scores in float64": lambda: same_as_the_cpu(lambda: lora(bert()), exact_scores),
}


if __name__ == "__main__":
    found: dict[str, Any] = {name: case() for name, case in CASES.items()}
    devices.WITHOUT_FLOAT64.add(pretend_device.DEVICE.type)
    found |= {f"{name} without float64": case() for name, case in WITHOUT_FLOAT64.items()}
    found["float64 there"] = error_of(lora(bert()), [classification_batch()], lambda *given: exact_scores(*given, None))
    found["not finite"] = error_of(broken_bert(), broken_example(3))
    found["out of range"] = error_of(lora(bert()), wrong_label())
    sys.stdout.write(json.dumps(found))
