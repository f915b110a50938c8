"""What the benchmarks share: where they compute, shapes, times, peak memory in a process of its own, the table."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fish_tuning.experiments.run.measure import PeakMemory

EXAMPLES, TOKENS, RANK = 64, 64, 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Rounds that are not counted: caches, and on a GPU kernels that are loaded or tuned, clocks that rise.
WARM_UP_ON_CPU, WARM_UP_ON_GPU = 1, 3

BERT: dict[str, dict[str, int]] = {
    "bert-base": {},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    # Where each operation takes the same time whatever it computes, as on a GPU.
    "narrow": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}
LLAMA: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096,
        "tie_word_embeddings": True, "pad_token_id": 0,
    },
}  # fmt: skip
LLAMA["tiny-llama"] = LLAMA["llama-1b"] | {
    "vocab_size": 30000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
SHAPES = [*BERT, *LLAMA]


@dataclass(frozen=True)
class Place:
    """Where a benchmark computes, and the dtype of its models' weights (PEFT keeps its adapters in fp32 either way)."""

    device: torch.device
    dtype: torch.dtype = torch.float32

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def arguments(self) -> list[str]:
        """For a process of its own in the same place."""
        return ["--device", str(self.device), "--dtype", str(self.dtype).removeprefix("torch.")]

    @contextlib.contextmanager
    def made_here(self) -> Iterator[None]:
        """Models that are made meanwhile lie on the device, in the dtype, from the start."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                yield
        finally:
            torch.set_default_dtype(before)

    def synchronize(self) -> None:
        """Wait for what a GPU was given to do."""
        if not self.is_cpu:
            torch.accelerator.synchronize()

    def seconds(self, run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
        """What `run` takes, begun when the device has nothing else to do and ended when it has done it.

        `clock=time.process_time`, which others on the machine do not lengthen, tells the CPU's own work alone, so it is
        taken on a CPU only.
        """
        clock = clock if self.is_cpu else time.perf_counter
        self.synchronize()
        start = clock()
        run()
        self.synchronize()
        return clock() - start

    def describe(self) -> str:
        threads = f"CPU, {torch.get_num_threads()} threads"
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        where = threads if self.is_cpu else name
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{where}, {dtype}, torch {torch.__version__}, Python {platform.python_version()}"


def add_place(parser: argparse.ArgumentParser) -> None:
    """--device and --dtype; one that is not here ends the program with a message and exit code 2."""
    parser.add_argument("--device", type=_device, default="cpu", help="cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the models' weights")


def place_of(args: argparse.Namespace) -> Place:
    return Place(args.device, DTYPES[args.dtype])


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{name!r} is no device; give cpu, cuda, cuda:1 or mps") from None
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    found = "cpu" if here is None else f"cpu and {here.type}"
    if device.type != "cpu" and (here is None or device.type != here.type):
        raise argparse.ArgumentTypeError(f"{name!r} is not on this machine; here there is {found}")
    if (device.index or 0) >= (1 if device.type == "cpu" else torch.accelerator.device_count()):
        raise argparse.ArgumentTypeError(f"{name!r} is not on this machine, which has fewer of them")
    if device.index and device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    return device


def turns(
    ways: Mapping[str, Callable[[], object]],
    place: Place,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: int | None = None,
) -> dict[str, list[float]]:
    """Seconds of each way in each round. The ways take turns, so a change of the machine's speed meets all of them."""
    if warm_up is None:
        warm_up = WARM_UP_ON_CPU if place.is_cpu else WARM_UP_ON_GPU
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warm_up + rounds):
        for name, run in ways.items():
            taken = place.seconds(run, clock)
            if turn >= warm_up:
                seconds[name].append(taken)
    return seconds


def ratios(seconds: Sequence[float], to: Sequence[float]) -> list[float]:
    """Within each round."""
    return [one / other for one, other in zip(seconds, to, strict=True)]


def base_model(shape: str, place: Place, **config_overrides: Any) -> Any:
    """A model of that shape with random weights, made where it is to compute."""
    torch.manual_seed(0)
    with place.made_here():
        if shape in LLAMA:
            return LlamaForCausalLM(LlamaConfig(**(LLAMA[shape] | {"use_cache": False} | config_overrides)))
        settings: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertForSequenceClassification(BertConfig(**(settings | BERT[shape] | config_overrides)))


def with_lora(shape: str, place: Place, rank: int = RANK, **config_overrides: Any) -> Any:
    """The same with LoRA on the attention's projections, both factors non-zero."""
    llama = shape in LLAMA
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["q_proj", "k_proj", "v_proj"] if llama else ["query", "key", "value"],
        modules_to_save=None if llama else ["classifier"],
        init_lora_weights="orthogonal",
    )
    return get_peft_model(base_model(shape, place, **config_overrides), lora).to(place.device)


def batches(
    size: int, place: Place, shape: str = "bert-base", examples: int = EXAMPLES, tokens: int = TOKENS
) -> list[dict[str, torch.Tensor]]:
    """`examples` x `tokens` random tokens with classes, or with themselves as labels, in batches of `size`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (examples, tokens), generator=generator).to(place.device)
    classes = torch.randint(0, 2, (examples,), generator=generator).to(place.device)
    labels = ids if shape in LLAMA else classes
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": label}
        for part, label in zip(ids.split(size), labels.split(size), strict=True)
    ]


def plain_pass(model: Any, data: Sequence[dict[str, torch.Tensor]]) -> None:
    """Forward and backward over the batches, as training does it; the gradients are dropped."""
    model.eval()
    for batch in data:
        model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)


def peak_of_own_process(script: str, *args: str) -> int:
    """Run `script --peak ARGS` and read the peak memory in bytes that it prints as JSON on its last line."""
    command = [sys.executable, script, "--peak", *args]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(json.loads(output.splitlines()[-1])["peak_bytes"])


def peaks_of_own_processes(script: str, ways: Iterable[str], place: Place, *args: str) -> dict[str, int]:
    """The same for each way, in that place; on a GPU at the same time, since it tells each process's own memory."""

    def peak(way: str) -> int:
        return peak_of_own_process(script, way, *args, *place.arguments)

    ways = list(ways)
    with ThreadPoolExecutor(1 if place.is_cpu else len(ways)) as pool:
        return dict(zip(ways, pool.map(peak, ways), strict=True))


def print_rise(run: Callable[[], object], place: Place) -> None:
    """What a `--peak` process does: print how far `run` rises above what was in use before it."""
    peak = PeakMemory(place.device)
    before = peak.bytes()
    run()
    print(json.dumps({"peak_bytes": peak.bytes() - before}))


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
