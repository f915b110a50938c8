"""Time and memory of selecting exactly k of many scores, beside torch.topk over all of them.

    python benchmarks/bench_selection.py [--millions 100]

Peak memory is what rises above the scores themselves; the masks alone take one byte an entry.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import machine, print_table

from fish_tuning import create_mask_from_fisher
from fish_tuning.experiments.run.measure import PeakMemory

TENSORS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, default=100)
    parser.add_argument("--keep-ratio", type=float, default=0.05)
    args = parser.parse_args()
    total = args.millions * 10**6
    generator = torch.Generator().manual_seed(0)
    scores = {str(i): torch.rand(total // TENSORS, generator=generator).square_() for i in range(TENSORS)}
    k = round(args.keep_ratio * total)

    def by_topk() -> int:
        flat = torch.cat(list(scores.values()))
        mask = torch.zeros(total, dtype=torch.bool)
        mask[flat.topk(k, sorted=False).indices] = True
        return int(mask.sum())

    def by_selection() -> int:
        return sum(int(mask.sum()) for mask in create_mask_from_fisher(scores, args.keep_ratio).values())

    rows = []
    for name, select in (("create_mask_from_fisher", by_selection), ("cat + topk", by_topk)):
        peak = PeakMemory(torch.device("cpu"))
        before, start = peak.bytes(), time.perf_counter()
        kept = select()
        seconds = time.perf_counter() - start
        rise = (peak.bytes() - before) / total
        rows.append([name, f"{kept:,}", f"{seconds:.1f}", f"{rise:.2f} bytes an entry"])
    print(f"{k:,} of {total:,} scores (fp32, 4 bytes an entry); {machine('cpu')}\n")
    print_table(["", "kept", "seconds", "peak memory above the scores"], rows)


if __name__ == "__main__":
    main()
