"""Memory and step time of training 0.5 % of the base model's own weights against PEFT LoRA r=8 on all linear layers.

    python benchmarks/bench_base_weights.py [--shape llama-1b] [--device cuda] [--dtype bfloat16] [--steps 10]

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
from collections.abc import Callable
from typing import Any

import torch
from common import (
    LLAMA,
    SHAPES,
    TOKENS,
    Place,
    add_place,
    base_model,
    batches,
    median,
    peaks_of_own_processes,
    place_of,
    print_rise,
    print_table,
    ratios,
    turns,
    verdict,
)
from peft import LoraConfig, get_peft_model

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


def prepare(arm: str, shape: str, place: Place) -> Any:
    model = base_model(shape, place)
    if shape in LLAMA:  # tied weights cannot be masked, so the table stays out of the pool
        model.get_input_embeddings().requires_grad_(False)
    if arm == LORA:
        task = "CAUSAL_LM" if shape in LLAMA else "SEQ_CLS"
        return get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type=task))
    if arm == MASKED:
        pool = {name: p for name, p in model.named_parameters() if p.requires_grad}
        scores = {name: torch.zeros(p.shape, device=place.device) for name, p in pool.items()}
        head = [name for name in scores if name.startswith("classifier")]
        apply_mask(model, create_mask_from_fisher(scores, KEEP, head, method="rand"))
    if arm == BIASES:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(("bias", "norm.weight")) or name.startswith("classifier"))
    return model


class Arm:
    """A model, its optimizer and one training step."""

    def __init__(self, arm: str, place: Place, args: argparse.Namespace) -> None:
        self.model = prepare(arm, args.shape, place).to(place.device).train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.01, fused=True)
        (self.batch,) = batches(args.batch_size, place, args.shape, args.batch_size)

    def step(self) -> None:
        self.model(**self.batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self) -> None:
        for _ in range(3):
            self.step()

    def bytes_beside(self, shape: str, place: Place) -> int:
        """What is kept in memory beside the base model, before the first step."""
        base = base_model(shape, Place(torch.device("meta"), place.dtype))
        masked = [tensor for each in masked_tensors(self.model) for tensor in (each.frozen, each.masked.index)]
        kept = (*self.model.parameters(), *self.model.buffers(), *masked)
        return sum(map(bytes_of, kept)) - sum(map(bytes_of, base.parameters()))


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def score(place: Place, args: argparse.Namespace) -> Callable[[], object]:
    model, size = base_model(args.shape, place), args.batch_size // 4
    if args.shape in LLAMA:
        model.get_input_embeddings().requires_grad_(False)
    data = batches(size, place, args.shape)
    return lambda: calculate_fisher_information(model, data, scores_dtype=SCORING[args.peak], progress=False)


def print_peak(place: Place, args: argparse.Namespace) -> None:
    work = score(place, args) if args.peak in SCORING else Arm(args.peak, place, args).steps
    if sys.platform == "linux":
        # What making the mask has freed goes back to the system, or the steps would use it and seem to need less.
        ctypes.CDLL(None).malloc_trim(0)
    print_rise(work, place)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_place(parser)
    parser.add_argument("--shape", choices=SHAPES, default="bert-base")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--peak", choices=[*ARMS, *SCORING], help=argparse.SUPPRESS)
    args = parser.parse_args()
    place = place_of(args)
    if args.peak:
        print_peak(place, args)
        return 0

    print(f"{args.shape} shape, {args.batch_size} x {TOKENS} tokens a step; {place.describe()}\n")
    common = ["--shape", args.shape, "--batch-size", str(args.batch_size)]
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)  # read by glibc when a process starts
    rises = peaks_of_own_processes(__file__, (*ARMS, *SCORING), place, *common)
    arms = {name: Arm(name, place, args) for name in ARMS}
    seconds = turns({name: arm.step for name, arm in arms.items()}, place, args.steps, warm_up=3)
    to_lora = {name: median(ratios(values, seconds[LORA])) for name, values in seconds.items()}
    beside = {name: arm.bytes_beside(args.shape, place) for name, arm in arms.items()}
    peaks = {name: rise + beside.get(name, 0) for name, rise in rises.items()}
    print_table(
        ["", "trained parameters", "ms a step (min / median)", "to LoRA", "optimizer state", "beside the base",
         "peak above the base", "to LoRA"],
        [
            [
                name,
                f"{count_trainable_parameters(arm.model):,}",
                f"{min(seconds[name]) * 1e3:.4g} / {median(seconds[name]) * 1e3:.4g}",
                f"{to_lora[name]:.3f}",
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
