"""Seconds, peak memory and sizes of one run."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import torch
from torch.distributed.tensor import DTensor

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class Stopwatch:
    """`with Stopwatch() as watch: ...` makes `watch.seconds`; a GPU's work in the block is done by its end."""

    seconds = 0.0

    def __enter__(self) -> Stopwatch:
        synchronize()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        synchronize()
        self.seconds = time.perf_counter() - self._started


def synchronize() -> None:
    """Wait for what a GPU was given to do."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class PeakMemory:
    """Peak memory from here on: that of the GPUs where `device` is one, else the process's resident memory."""

    def __init__(self, device: torch.device) -> None:
        self.of = "gpu" if device.type == "cuda" else "process"
        if self.of == "gpu":
            for number in range(torch.cuda.device_count()):  # a model may lie on several
                torch.cuda.reset_peak_memory_stats(number)
        elif _CLEAR_REFS.exists():
            _CLEAR_REFS.write_text("5")  # Linux: sets the high-water mark back to what is resident now

    def bytes(self) -> int:
        if self.of == "gpu":
            return sum(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
        if _STATUS.exists():
            line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        # Elsewhere the high-water mark cannot be set back: it is the process's since its start.
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss)) if sys.platform == "win32" else _maximum_resident()


def _maximum_resident() -> int:
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors an optimizer keeps between steps (AdamW: two numbers for each trained one), in this process.

    FSDP leaves each process a part of them.
    """
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    own = [value.to_local() if isinstance(value, DTensor) else value for value in kept]
    return sum(value.numel() * value.element_size() for value in own)
