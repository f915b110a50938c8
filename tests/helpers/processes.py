"""Tests in several processes that talk over gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

from fish_tuning.errors import FishTuningError

# What both of two processes would load, for as long as most of these tests take otherwise, is loaded once for all.
_LOADED = ["torch._dynamo", "torch.distributed.fsdp", "transformers.trainer", "peft", "tiny", "fish_tuning"]


def refusal(call: Callable[[], Any]) -> str:
    """The library's own error of a call; `accepted` where it raises none. Any other error ends the process."""
    try:
        call()
    except FishTuningError as error:
        return str(error)
    return "accepted"


def in_two_processes(work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What `work(rank, folder, *args)` gives in each of two processes of one group."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": "", "FISH_TUNING_DEVICE": "cpu"}):  # gloo's device
        multiprocessing.set_forkserver_preload(_LOADED)
        torch.multiprocessing.start_processes(  # type: ignore[no-untyped-call]
            _process, (port, work, folder, args), nprocs=2, start_method="forkserver"
        )
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def once_in_two_processes(
    work: Callable[..., Any], folders: pytest.TempPathFactory, name: str, *args: Any
) -> list[Any]:
    """The same for a fixture of a module, whose tests may run in several of pytest's workers: one does the work.

    The others wait for it, and read what it has written. `name` is the work's own.
    """
    base = folders.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(base / f"{name}.lock"):
        folder, done = base / name, base / f"{name}.done"
        if not done.exists():
            folder.mkdir(exist_ok=True)
            in_two_processes(work, folder, *args)
            done.touch()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _process(rank: int, port: int, work: Callable[..., Any], folder: Path, args: tuple[Any, ...]) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(work(rank, folder, *args), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
