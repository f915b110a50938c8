"""What exact scores cost by the shape of the batches, against a plain training pass, the check of the rules included.

    python benchmarks/bench_batch_shapes.py [--shape minilm] [--device cuda] [--rounds 5] [--batches 3]

LoRA r=16 on query/key/value of BERT-base or MiniLM shape. The ways take turns; a ratio is the median over rounds of the
ratio within the round. Limit: 1.05.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import RANK, SHAPES, bert, machine, median, print_table, synchronize, verdict

from fish_tuning import calculate_fisher_information

BATCHES = [(1, 64), (32, 64), (8, 256), (2, 1024)]
LIMIT = 1.05


def batches(rows: int, tokens: int, number: int, device: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(number):
        ids = torch.randint(1000, 30000, (rows, tokens), generator=generator).to(device)
        labels = torch.randint(0, 2, (rows,), generator=generator).to(device)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def plain(model: Any, data: list[dict[str, torch.Tensor]]) -> None:
    model.eval()
    for batch in data:
        model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)


def seconds_of(run: Callable[[], object], device: str) -> float:
    """On a CPU those of this process, which others on the machine do not lengthen."""
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    synchronize(device)
    start = clock()
    run()
    synchronize(device)
    return clock() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="bert-base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=3)
    args = parser.parse_args()
    print(f"{args.shape} shape, LoRA r={RANK} on query/key/value, {args.batches} batches; {machine(args.device)}\n")
    model = bert(args.device, shape=args.shape, max_position_embeddings=1024)
    rows, kept = [], []
    for size, tokens in BATCHES:
        data = batches(size, tokens, args.batches, args.device)
        ways: dict[str, Callable[[], object]] = {
            "plain": lambda data=data: plain(model, data),  # type: ignore[misc]
            "scores": lambda data=data: calculate_fisher_information(model, data, progress=False),  # type: ignore[misc]
        }
        rounds = [{way: seconds_of(run, args.device) for way, run in ways.items()} for _ in range(args.rounds + 1)][1:]
        ratio = median([each["scores"] / each["plain"] for each in rounds])
        spread = [each["scores"] / each["plain"] for each in rounds]
        name = f"{size} x {tokens:,}"
        seconds = median([each["plain"] for each in rounds])
        rows.append([name, f"{seconds:.2f}", f"{ratio:.3f}", f"{min(spread):.3f} to {max(spread):.3f}"])
        kept.append(verdict(name, ratio, LIMIT, at_most=True))
    print_table(["rows x tokens", "plain pass, s", "scores / plain", "over rounds"], rows)
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
