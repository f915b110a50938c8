"""Step time, memory and bytes of masked training against plain LoRA of the same rank.

    python benchmarks/bench_training.py [--shape llama-1b] [--device cuda] [--dtype bfloat16] [--steps 20]

LoRA r=16 on query/key/value of a model of that shape, batches of 16 x 64 tokens (--batch-size, --tokens),
AdamW as the Trainer makes it (fused), clipping. The arms take turns step by step in one process; a ratio is the
median over steps of the ratio within the turn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import (
    RANK,
    SHAPES,
    TOKENS,
    Place,
    add_place,
    batches,
    median,
    peaks_of_own_processes,
    place_of,
    print_rise,
    print_table,
    ratios,
    turns,
    verdict,
    with_lora,
)

from fish_tuning import apply_mask, count_trainable_parameters, create_mask_from_fisher
from fish_tuning.experiments.run.measure import optimizer_state_bytes

ARMS: dict[str, float | None] = {"plain LoRA": None, "keep 50 %": 0.5, "keep 5 %": 0.05, "keep 0.5 %": 0.005}


class Arm:
    """A model, its optimizer and one training step."""

    def __init__(self, keep_ratio: float | None, place: Place, args: argparse.Namespace) -> None:
        self.model = with_lora(args.shape, place)
        if keep_ratio is not None:
            # Which entries are kept changes no cost, so a random mask of the same size will do.
            scores = {n: torch.zeros(p.shape) for n, p in self.model.named_parameters() if p.requires_grad}
            head = [name for name in scores if "modules_to_save" in name]
            mask = create_mask_from_fisher(scores, keep_ratio, head, method="rand")
            apply_mask(self.model, mask)
        self.model.train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trained, self.optimizer = trained, torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=True)
        (self.batch,) = batches(args.batch_size, place, args.shape, args.batch_size, args.tokens)

    def step(self) -> None:
        self.model(**self.batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def adapter_bytes(self) -> int:
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            return Path(folder, "adapter_model.safetensors").stat().st_size


def several(step: Callable[[], None], times: int = 3) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            step()

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_place(parser)
    parser.add_argument("--shape", choices=SHAPES, default="bert-base")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--peak", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    place = place_of(args)
    if args.peak:
        print_rise(several(Arm(ARMS[args.peak], place, args).step), place)
        return 0

    print(f"{args.shape} shape, LoRA r={RANK} on query/key/value, {args.batch_size} x {args.tokens} tokens a step; "
          f"{place.describe()}\n")  # fmt: skip
    arms = {name: Arm(ratio, place, args) for name, ratio in ARMS.items()}
    seconds = turns({name: arm.step for name, arm in arms.items()}, place, args.steps, warm_up=3)
    to_plain = {name: median(ratios(values, seconds["plain LoRA"])) for name, values in seconds.items()}
    common = ["--shape", args.shape, "--batch-size", str(args.batch_size), "--tokens", str(args.tokens)]
    peaks = peaks_of_own_processes(__file__, ARMS, place, *common)
    print_table(
        ["", "trained parameters", "ms a step (min / median)", "to plain", "optimizer state", "peak above start",
         "adapter file"],
        [
            [
                name,
                f"{count_trainable_parameters(arm.model):,}",
                f"{min(seconds[name]) * 1e3:.4g} / {median(seconds[name]) * 1e3:.4g}",
                f"{to_plain[name]:.3f}",
                f"{optimizer_state_bytes(arm.optimizer) / 1e3:.0f} kB",
                f"{peaks[name] / 2**20:.0f} MiB",
                f"{arm.adapter_bytes() / 1e3:.0f} kB",
            ]
            for name, arm in arms.items()
        ],
    )  # fmt: skip
    print()
    kept = [verdict(f"step time, {n}, to plain LoRA", r, 1.03, at_most=True) for n, r in to_plain.items() if ARMS[n]]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
