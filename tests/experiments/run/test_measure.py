from __future__ import annotations

import mmap

import torch

from fish_tuning.experiments.run.measure import PeakMemory, optimizer_state_bytes


def test_peak_memory_sees_what_is_gone_and_starts_anew() -> None:
    peak = PeakMemory(torch.device("cpu"))
    before = peak.bytes()
    with mmap.mmap(-1, 2**26) as pages:  # 64 MiB anew: the allocator might give room that was freed before
        pages.write(bytes(2**26))
    risen = peak.bytes() - before
    assert risen > 50 * 2**20
    assert PeakMemory(torch.device("cpu")).bytes() < before + risen - 50 * 2**20


def test_optimizer_state_is_counted_in_bytes() -> None:
    parameter = torch.nn.Parameter(torch.ones(10))
    optimizer = torch.optim.AdamW([parameter])
    assert optimizer_state_bytes(optimizer) == 0
    parameter.sum().backward()
    optimizer.step()
    assert optimizer_state_bytes(optimizer) == 2 * 10 * 4 + 4  # two moments, and the step
