"""Time and peak memory of exact Fisher scores, with mean gradients and without, against a plain training pass and the
batch-1 loop.

    python benchmarks/bench_fisher.py [--shape llama-1b] [--device cuda] [--dtype bfloat16] [--rounds 5]

LoRA r=16 on query/key/value of a model of that shape, 64 examples x 64 tokens (--examples, --tokens). The ways
take turns in one process, so that a change of the machine's speed meets all of them; a ratio is the median over rounds
of the ratio within the round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from common import (
    EXAMPLES,
    RANK,
    SHAPES,
    TOKENS,
    Place,
    add_place,
    batches,
    median,
    peaks_of_own_processes,
    place_of,
    plain_pass,
    print_rise,
    print_table,
    ratios,
    turns,
    verdict,
    with_lora,
)

from fish_tuning import calculate_fisher_information, measure_moments

WAYS = ("plain", "batched", "moments", "loop")


def work(way: str, model: Any, place: Place, args: argparse.Namespace) -> Callable[[], object]:
    data = batches(1 if way == "loop" else args.batch_size, place, args.shape, args.examples, args.tokens)
    if way == "plain":
        return lambda: plain_pass(model, data)
    if way == "moments":
        return lambda: measure_moments(model, data, progress=False)
    return lambda: calculate_fisher_information(model, data, method="loop" if way == "loop" else "auto", progress=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_place(parser)
    parser.add_argument("--shape", choices=SHAPES, default="bert-base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--without-loop", action="store_true", help="which takes most of the time on a GPU")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    place = place_of(args)
    model = with_lora(args.shape, place)
    if args.peak:
        print_rise(work(args.peak, model, place, args), place)
        return 0

    print(f"{args.shape} shape, LoRA r={RANK} on query/key/value, {args.examples} examples x {args.tokens} tokens, "
          f"batches of {args.batch_size}; {place.describe()}\n")  # fmt: skip
    ways = [way for way in WAYS if way != "loop" or not args.without_loop]
    seconds = turns({way: work(way, model, place, args) for way in ways}, place, args.rounds)
    common = ["--batch-size", str(args.batch_size), "--shape", args.shape]
    common += ["--examples", str(args.examples), "--tokens", str(args.tokens)]
    peaks = peaks_of_own_processes(__file__, ways, place, *common)
    to_plain = {way: median(ratios(seconds[way], seconds["plain"])) for way in ways}
    print_table(
        ["", "seconds (min / median / max)", "to plain", "peak memory above start"],
        [
            [
                way,
                f"{min(seconds[way]):.3g} / {median(seconds[way]):.3g} / {max(seconds[way]):.3g}",
                f"{to_plain[way]:.3f}",
                f"{peaks[way] / 2**20:.0f} MiB",
            ]
            for way in ways
        ],
    )
    print()
    gradients = median(ratios(seconds["moments"], seconds["batched"]))
    one_layer = args.batch_size * RANK * model.config.hidden_size * 4 / 2**20
    more = (peaks["batched"] - peaks["plain"]) / 2**20
    kept = [
        verdict("batched / plain pass", to_plain["batched"], 1.10, at_most=True),
        verdict("with mean gradients / batched", gradients, 1.10, at_most=True),
        verdict("MiB above the plain pass's peak (limit: one layer's per-example gradients)", more, one_layer,
                at_most=True),
    ]  # fmt: skip
    if "loop" in ways:
        faster = median(ratios(seconds["loop"], seconds["batched"]))
        kept.append(verdict("loop / batched", faster, 2.5, at_most=False))
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
