"""Peak memory and sizes of one run."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Peak memory from here on: the GPU's where there is one, else the process's resident memory."""

    def __init__(self, of: str | None = None) -> None:
        self.of = of or ("gpu" if torch.cuda.is_available() else "process")
        if self.of == "gpu":
            torch.cuda.reset_peak_memory_stats()
        elif _CLEAR_REFS.exists():
            _CLEAR_REFS.write_text("5")  # Linux: sets the high-water mark back to what is resident now

    def bytes(self) -> int:
        if self.of == "gpu":
            return torch.cuda.max_memory_allocated()
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
    """Bytes of all tensors an optimizer keeps between steps (AdamW: two numbers for each trained one)."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
