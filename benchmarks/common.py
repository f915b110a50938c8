"""What the benchmarks share: the BERT-base shape, peak memory in a process of its own, and the printed table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from fish_tuning.experiments.run.measure import PeakMemory

EXAMPLES, TOKENS, RANK = 64, 64, 16


SHAPES: dict[str, dict[str, int]] = {
    "bert-base": {},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
}


def bert(device: str = "cpu", rank: int = RANK, shape: str = "bert-base", **config_overrides: Any) -> Any:
    """A BERT of that shape with random weights, LoRA on query/key/value, both factors non-zero."""
    torch.manual_seed(0)
    settings = SHAPES[shape] | config_overrides
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **settings)
    model = BertForSequenceClassification(config)
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["query", "key", "value"],
        modules_to_save=["classifier"],
        init_lora_weights="orthogonal",
    )
    return get_peft_model(model, lora).to(device)


def batches(size: int, device: str = "cpu") -> list[dict[str, torch.Tensor]]:
    """EXAMPLES x TOKENS random tokens with labels, in batches of `size`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (EXAMPLES, TOKENS), generator=generator).to(device)
    labels = torch.randint(0, 2, (EXAMPLES,), generator=generator).to(device)
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": label}
        for part, label in zip(ids.split(size), labels.split(size), strict=True)
    ]


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_of_own_process(script: str, *args: str) -> int:
    """Run `script --peak ARGS` and read the peak memory in bytes that it prints as JSON on its last line."""
    command = [sys.executable, script, "--peak", *args]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(json.loads(output.splitlines()[-1])["peak_bytes"])


def print_rise(run: Callable[[], object], device: str) -> None:
    """What a `--peak` process does: print how far `run` rises above what was in use before it."""
    peak = PeakMemory(torch.device(device))
    before = peak.bytes()
    run()
    print(json.dumps({"peak_bytes": peak.bytes() - before}))


def machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def verdict(name: str, value: float, limit: float, *, at_most: bool) -> bool:
    """Print a figure beside its limit; whether it is kept."""
    kept = value <= limit if at_most else value >= limit
    print(
        f"{name}: {value:.3f} (limit: {'at most' if at_most else 'at least'} {limit:g}): {'kept' if kept else 'MISSED'}"
    )
    return kept
