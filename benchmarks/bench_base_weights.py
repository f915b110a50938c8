"""Memory and step time of training 0.5 % of the base model's own weights against PEFT LoRA r=8 on all linear layers.

    python benchmarks/bench_base_weights.py [--shape minilm] [--device cuda] [--steps 10] [--batch-size 16]

All weights are in the pool (embeddings, LayerNorms, biases, Linear layers); the classifier trains whole in every arm.
The entries are chosen at random: which ones are kept changes no cost, and scoring would leave its own peak behind.
Batches of 64 tokens, fused AdamW, clipping. The arms take turns step by step in one process; a ratio is the median over
steps of the ratio within the turn. Peak memory is taken in a process of its own: the rise above the model before the
first step, plus what the arm keeps beside the base model (adapter, or positions and values). glibc is told to give
every freed tensor back at once: left alone, gaps in its heap add 90 to 690 MiB, most to LoRA, and hide what is needed.
A second table has the peak of scoring all weights, the scores included, by the dtype that they are kept in. Scores do
not depend on the batch size, so a quarter of the training step's batch is taken.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import (
    SHAPES,
    TOKENS,
    batches,
    machine,
    median,
    peak_of_own_process,
    print_rise,
    print_table,
    synchronize,
    verdict,
)
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from fish_tuning import (
    apply_mask,
    calculate_fisher_information,
    count_trainable_parameters,
    create_mask_from_fisher,
)
from fish_tuning.experiments.run.measure import optimizer_state_bytes
from fish_tuning.sparse.masked_tensors import masked_tensors

KEEP, RANK = 0.005, 8
LORA, MASKED, BIASES, FULL = "LoRA r=8, all linear", "0.5 % of all weights", "all biases (BitFit)", "all weights"
ARMS = [LORA, MASKED, BIASES, FULL]
SCORING = {"scores in float32": torch.float32, "scores in bfloat16": torch.bfloat16}


def base_model(shape: str) -> Any:
    torch.manual_seed(0)
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SHAPES[shape])
    return BertForSequenceClassification(config)


def prepare(arm: str, shape: str) -> Any:
    model = base_model(shape)
    if arm == LORA:
        return get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="SEQ_CLS"))
    if arm == MASKED:
        scores = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
        apply_mask(model, create_mask_from_fisher(scores, KEEP, ["classifier"], method="rand"))
    if arm == BIASES:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias") or name.startswith("classifier"))
    return model


class Arm:
    """A model, its optimizer and one training step."""

    def __init__(self, arm: str, args: argparse.Namespace) -> None:
        self.model = prepare(arm, args.shape).to(args.device).train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.01, fused=True)
        self.batch = batches(args.batch_size, args.device)[0]

    def step(self) -> None:
        self.model(**self.batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self) -> None:
        for _ in range(3):
            self.step()

    def bytes_beside(self, shape: str) -> int:
        """What is kept in memory beside the base model, before the first step."""
        base = sum(parameter.numel() * parameter.element_size() for parameter in base_model(shape).parameters())
        masked = [tensor for each in masked_tensors(self.model) for tensor in (each.frozen, each.masked.index)]
        kept = (*self.model.parameters(), *self.model.buffers(), *masked)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept) - base


def score(args: argparse.Namespace) -> Callable[[], object]:
    model, data = base_model(args.shape).to(args.device), batches(args.batch_size // 4, args.device)
    return lambda: calculate_fisher_information(model, data, scores_dtype=SCORING[args.peak], progress=False)


def print_peak(args: argparse.Namespace) -> None:
    work = score(args) if args.peak in SCORING else Arm(args.peak, args).steps
    if sys.platform == "linux":
        # What making the mask has freed goes back to the system, or the steps would use it and seem to need less.
        ctypes.CDLL(None).malloc_trim(0)
    print_rise(work, args.device)


def step_times(arms: dict[str, Arm], args: argparse.Namespace) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(args.steps + 2):
        for name, arm in arms.items():
            synchronize(args.device)
            start = time.perf_counter()
            arm.step()
            synchronize(args.device)
            if turn >= 2:  # the first turns warm up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="bert-base")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--peak", choices=[*ARMS, *SCORING], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print_peak(args)
        return 0

    print(f"{args.shape} shape, {args.batch_size} x {TOKENS} tokens a step; {machine(args.device)}\n")
    common = ["--shape", args.shape, "--device", args.device, "--batch-size", str(args.batch_size)]
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)  # read by glibc when a process starts
    rises = {name: peak_of_own_process(__file__, name, *common) for name in (*ARMS, *SCORING)}
    arms = {name: Arm(name, args) for name in ARMS}
    seconds = step_times(arms, args)
    ratios = {n: median([s / p for s, p in zip(values, seconds[LORA], strict=True)]) for n, values in seconds.items()}
    beside = {name: arm.bytes_beside(args.shape) for name, arm in arms.items()}
    peaks = {name: rise + beside.get(name, 0) for name, rise in rises.items()}
    print_table(
        ["", "trained parameters", "ms a step (min / median)", "to LoRA", "optimizer state", "beside the base",
         "peak above the base", "to LoRA"],
        [
            [
                name,
                f"{count_trainable_parameters(arm.model):,}",
                f"{min(seconds[name]) * 1e3:.0f} / {median(seconds[name]) * 1e3:.0f}",
                f"{ratios[name]:.3f}",
                f"{optimizer_state_bytes(arm.optimizer) / 2**20:.1f} MiB",
                f"{beside[name] / 2**20:.1f} MiB",
                f"{peaks[name] / 2**20:.0f} MiB",
                f"{peaks[name] / peaks[LORA]:.3f}",
            ]
            for name, arm in arms.items()
        ],
    )  # fmt: skip
    print()
    print_table(
        ["scoring all weights", "peak above the base", "to training LoRA"],
        [[name, f"{peaks[name] / 2**20:.0f} MiB", f"{peaks[name] / peaks[LORA]:.3f}"] for name in SCORING],
    )
    print()
    return 0 if verdict(f"peak memory, {MASKED}, to LoRA", peaks[MASKED] / peaks[LORA], 1.15, at_most=True) else 1


if __name__ == "__main__":
    sys.exit(main())
