"""Time and peak memory of exact Fisher scores, with mean gradients and without, against a plain training pass and the
batch-1 loop.

    python benchmarks/bench_fisher.py [--shape minilm] [--device cuda] [--rounds 5] [--batch-size 16]

A BERT of BERT-base or MiniLM shape, LoRA r=16 on query/key/value, 64 examples x 64 tokens. The ways take turns in
one process, so that a change of the machine's speed meets all of them; a ratio is the median over rounds of the ratio
within the round.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from common import (
    EXAMPLES,
    RANK,
    SHAPES,
    TOKENS,
    batches,
    bert,
    machine,
    median,
    peak_of_own_process,
    print_rise,
    print_table,
    synchronize,
    verdict,
)

from fish_tuning import calculate_fisher_information, measure_moments

WAYS = ("plain", "batched", "moments", "loop")


def work(way: str, model: Any, device: str, batch_size: int) -> Callable[[], object]:
    if way == "plain":
        data = batches(batch_size, device)

        def plain() -> None:
            model.eval()
            for batch in data:
                model(**batch).loss.backward()
            model.zero_grad(set_to_none=True)

        return plain
    data = batches(1 if way == "loop" else batch_size, device)
    if way == "moments":
        return lambda: measure_moments(model, data, progress=False)
    method = "loop" if way == "loop" else "auto"
    return lambda: calculate_fisher_information(model, data, method=method, progress=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="bert-base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print_rise(work(args.peak, bert(args.device, shape=args.shape), args.device, args.batch_size), args.device)
        return 0

    print(f"{args.shape} shape, LoRA r={RANK} on query/key/value, {EXAMPLES} examples x {TOKENS} tokens, batches of "
          f"{args.batch_size}; {machine(args.device)}\n")  # fmt: skip
    model = bert(args.device, shape=args.shape)
    runs = {way: work(way, model, args.device, args.batch_size) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for round_number in range(args.rounds + 1):
        for way, run in runs.items():
            synchronize(args.device)
            start = time.perf_counter()
            run()
            synchronize(args.device)
            if round_number:  # the first round warms up
                seconds[way].append(time.perf_counter() - start)
    common = ["--device", args.device, "--batch-size", str(args.batch_size), "--shape", args.shape]
    peaks = {way: peak_of_own_process(__file__, way, *common) for way in WAYS}
    to_plain = {way: median([s / p for s, p in zip(seconds[way], seconds["plain"], strict=True)]) for way in WAYS}
    print_table(
        ["", "seconds (min / median / max)", "to plain", "peak memory above start"],
        [
            [
                way,
                f"{min(seconds[way]):.2f} / {median(seconds[way]):.2f} / {max(seconds[way]):.2f}",
                f"{to_plain[way]:.3f}",
                f"{peaks[way] / 2**20:.0f} MiB",
            ]
            for way in WAYS
        ],
    )
    print()
    faster = median([loop / b for loop, b in zip(seconds["loop"], seconds["batched"], strict=True)])
    gradients = median([m / b for m, b in zip(seconds["moments"], seconds["batched"], strict=True)])
    one_layer = args.batch_size * RANK * model.config.hidden_size * 4 / 2**20
    more = (peaks["batched"] - peaks["plain"]) / 2**20
    kept = [
        verdict("batched / plain pass", to_plain["batched"], 1.10, at_most=True),
        verdict("with mean gradients / batched", gradients, 1.10, at_most=True),
        verdict("loop / batched", faster, 2.5, at_most=False),
        verdict("MiB above the plain pass's peak (limit: one layer's per-example gradients)", more, one_layer,
                at_most=True),
    ]  # fmt: skip
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
