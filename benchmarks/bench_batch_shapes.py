"""What exact scores cost by the shape of the batches, against a plain training pass, the check of the rules included.

    python benchmarks/bench_batch_shapes.py [--shape llama-1b] [--device cuda] [--dtype bfloat16] [--rounds 5]
    python benchmarks/bench_batch_shapes.py --trained all [--rows-and-tokens 16x64 4x64] [--batches 4]

LoRA r=16 on query/key/value of a model of that shape, or all of its weights without warm-up, three batches (--batches).
The ways take turns; a ratio is the median over rounds of the ratio within the round. Limit: 1.05.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from common import (
    LLAMA,
    RANK,
    SHAPES,
    add_place,
    base_model,
    batches,
    median,
    place_of,
    plain_pass,
    print_table,
    ratios,
    turns,
    verdict,
    with_lora,
)

from fish_tuning import calculate_fisher_information

BATCHES = ["1x64", "32x64", "8x256", "2x1024"]
LIMIT = 1.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_place(parser)
    parser.add_argument("--shape", choices=SHAPES, default="bert-base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trained", choices=["lora", "all"], default="lora")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--rows-and-tokens", nargs="+", default=BATCHES, metavar="ROWSxTOKENS")
    args = parser.parse_args()
    place = place_of(args)
    trained = "all weights" if args.trained == "all" else f"LoRA r={RANK} on query/key/value"
    print(f"{args.shape} shape, {trained}, {args.batches} batches; {place.describe()}\n")
    longest = {} if args.shape in LLAMA else {"max_position_embeddings": 1024}
    warmup_steps = 0 if args.trained == "all" else None
    make = base_model if args.trained == "all" else with_lora
    model = make(args.shape, place, **longest)
    rows, kept = [], []
    for size, tokens in (map(int, shape.split("x")) for shape in args.rows_and_tokens):
        data = batches(size, place, args.shape, size * args.batches, tokens)
        ways: dict[str, Callable[[], object]] = {
            "plain": lambda data=data: plain_pass(model, data),  # type: ignore[misc]
            "scores": lambda data=data: calculate_fisher_information(  # type: ignore[misc]
                model, data, warmup_steps=warmup_steps, progress=False
            ),
        }
        seconds = turns(ways, place, args.rounds, clock=time.process_time)
        spread = ratios(seconds["scores"], seconds["plain"])
        name, ratio, plain = f"{size} x {tokens:,}", median(spread), median(seconds["plain"])
        rows.append([name, f"{plain:.3g}", f"{ratio:.3f}", f"{min(spread):.3f} to {max(spread):.3f}"])
        kept.append(verdict(name, ratio, LIMIT, at_most=True))
    print_table(["rows x tokens", "plain pass, s", "scores / plain", "over rounds"], rows)
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
