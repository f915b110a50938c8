"""Time and memory of selecting exactly k of many scores, beside torch.topk over all of them.

    python benchmarks/bench_selection.py [--millions 100] [--device cuda] [--dtype bfloat16]

--dtype is that of the scores.
Peak memory is what rises above the scores themselves; the masks alone take one byte an entry.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from common import add_place, place_of, print_table

from fish_tuning import create_mask_from_fisher
from fish_tuning.experiments.run.measure import PeakMemory

TENSORS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_place(parser)
    parser.add_argument("--millions", type=int, default=100)
    parser.add_argument("--keep-ratio", type=float, default=0.05)
    args = parser.parse_args()
    total = args.millions * 10**6
    place = place_of(args)
    generator = torch.Generator(place.device).manual_seed(0)
    scores = {
        str(i): torch.rand(total // TENSORS, generator=generator, device=place.device).square_().to(place.dtype)
        for i in range(TENSORS)
    }
    k = round(args.keep_ratio * total)

    def by_topk() -> int:
        flat = torch.cat(list(scores.values()))
        mask = torch.zeros(total, dtype=torch.bool, device=place.device)
        mask[flat.topk(k, sorted=False).indices] = True
        return int(mask.sum())

    def by_selection() -> int:
        return sum(int(mask.sum()) for mask in create_mask_from_fisher(scores, args.keep_ratio).values())

    rows = []
    for name, select in (("create_mask_from_fisher", by_selection), ("cat + topk", by_topk)):
        if not place.is_cpu:  # the first call of a GPU's kernel loads it
            select()
        peak = PeakMemory(place.device)
        before = peak.bytes()
        kept = 0

        def run(select: Callable[[], int] = select) -> None:
            nonlocal kept
            kept = select()

        seconds = place.seconds(run)
        rise = (peak.bytes() - before) / total
        rows.append([name, f"{kept:,}", f"{seconds:.3g}", f"{rise:.2f} bytes an entry"])
    print(f"{k:,} of {total:,} scores; {place.describe()}\n")
    print_table(["", "kept", "seconds", "peak memory above the scores"], rows)


if __name__ == "__main__":
    main()
