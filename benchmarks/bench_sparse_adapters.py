"""Many sparse adapters on one base model beside PEFT's ordinary ones: disk, load, memory, switch; and the file's size.

    python benchmarks/bench_sparse_adapters.py [--shape minilm] [--device cuda] [--sparse 1000] [--ordinary 20]

LoRA r=16 on query/key/value from one seed, 10 % of the entries kept at random (the worst case for their places) with
random values, float32, no head. Ordinary adapters are fewer, since a thousand of them need gigabytes; what is the same
for each of them is multiplied, and marked *. A switch is timed from each adapter to the next, and for ten pairs the
outputs of both ways are compared to the bit. On a CPU the times are this process's CPU time, which other work on the
machine changes less than the clock's.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import BERT, Place, add_place, median, place_of, print_table, verdict
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertModel

from fish_tuning import (
    SparseAdapter,
    add_sparse_adapter,
    apply_mask,
    create_mask_from_fisher,
    load_sparse_adapter,
    save_sparse_adapter,
    set_sparse_adapter,
    start_from_seed,
    write_adapter_folder,
)
from fish_tuning.files.places import pack_places
from fish_tuning.files.sparse_adapter_file import state_digest, write_sparse_adapter

RANK, KEEP = 16, 0.1
DTYPES = (torch.float32, torch.bfloat16)


def base_model(shape: str) -> Any:
    torch.manual_seed(0)
    return BertModel(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **BERT[shape])).eval()


def first_adapter(shape: str, keep: float, dtype: torch.dtype, folder: Path) -> tuple[SparseAdapter, int, int]:
    """A sparse adapter, the size of its file, and that of the ordinary adapter's weights."""
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["query", "key", "value"])
    model: Any = get_peft_model(base_model(shape), lora)
    start_from_seed(model, seed=1)
    model.to(dtype)
    scores = {name: torch.zeros(each.shape) for name, each in model.named_parameters() if each.requires_grad}
    apply_mask(model, create_mask_from_fisher(scores, keep, method="rand"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    save_sparse_adapter(model, folder / "first.safetensors")
    model.save_pretrained(folder / "first")
    ordinary = (folder / "first/adapter_model.safetensors").stat().st_size
    return load_sparse_adapter(folder / "first.safetensors"), (folder / "first.safetensors").stat().st_size, ordinary


def another(adapter: SparseAdapter, seed: int) -> SparseAdapter:
    """As many entries at other places, with other values."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for tensor in adapter.tensors:
        count, size = len(tensor.values), tensor.shape.numel()
        index = torch.randperm(size, generator=generator)[:count].sort().values.int()
        values = 0.02 * torch.randn(count, generator=generator)
        tensors.append(dataclasses.replace(tensor, index=index, values=values))
    made = dataclasses.replace(adapter, tensors=tuple(tensors))
    return dataclasses.replace(made, digest=state_digest({each.key: each.dense(made.seed) for each in tensors}))


def sizes(shape: str) -> list[list[str]]:
    rows = []
    for dtype in DTYPES:
        for keep, limit in ((0.1, 0.15), (0.01, 0.02)):
            with tempfile.TemporaryDirectory() as folder:
                _, sparse, ordinary = first_adapter(shape, keep, dtype, Path(folder))
            share = sparse / ordinary
            name = str(dtype).removeprefix("torch.")
            rows.append(
                [name, f"{keep:.0%}", f"{ordinary:,}", f"{sparse:,}", f"{share:.2%}", f"{limit:.0%}",
                 "kept" if share <= limit else "MISSED"]
            )  # fmt: skip
    return rows


def places(shape: str) -> list[list[str]]:
    """Bits a place, in each of the codes that were looked at."""
    size, rows = RANK * BERT[shape].get("hidden_size", 768), []
    for keep in (0.001, 0.01, 0.1, 0.5):
        bits = dict.fromkeys(("packed", "bitmap", "varint", "int32"), 0)
        count = 0
        for seed in range(20):
            where = np.flatnonzero(np.random.default_rng(seed).random(size) < keep)
            gaps = np.diff(where, prepend=-1) - 1
            bits["packed"] += 8 * len(pack_places(where, size)[1])
            bits["bitmap"] += 8 * ((size + 7) // 8)
            bits["varint"] += 8 * int(np.maximum(1, -(-np.ceil(np.log2(gaps + 1)) // 7)).sum())
            bits["int32"] += 32 * len(where)
            count += len(where)
        least = -(keep * np.log2(keep) + (1 - keep) * np.log2(1 - keep)) / keep
        rows.append([f"{keep:.1%}", *(f"{total / count:.2f}" for total in bits.values()), f"{least:.2f}"])
    return rows


def timed(place: Place, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the work gave."""
    results: list[Any] = []
    seconds = place.seconds(lambda: results.append(work()), clock=time.process_time)
    return seconds, results[0]


def milliseconds(seconds: Sequence[float]) -> str:
    return f"{min(seconds) * 1e3:.2f} / {median(seconds) * 1e3:.2f} / {max(seconds) * 1e3:.2f}"


def add_all(args: argparse.Namespace, files: list[Path]) -> tuple[Any, list[float]]:
    model: Any = base_model(args.shape).to(args.device)
    place, seconds = place_of(args), []
    for number, file in enumerate(files):
        second, model = timed(place, partial(add_sparse_adapter, model, file, str(number)))
        seconds.append(second)
    return model.to(args.device), seconds


def load_all(args: argparse.Namespace, folders: list[Path]) -> tuple[Any, list[float]]:
    place, base = place_of(args), base_model(args.shape).to(args.device)
    second, model = timed(place, lambda: PeftModel.from_pretrained(base, folders[0], adapter_name="0"))
    seconds = [second]
    for number, folder in enumerate(folders[1:], 1):
        seconds.append(timed(place, lambda f=folder, n=number: model.load_adapter(f, str(n)))[0])
    return model, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=BERT, default="bert-base")
    add_place(parser)
    parser.add_argument("--sparse", type=int, default=1000)
    parser.add_argument("--ordinary", type=int, default=20)
    args = parser.parse_args()
    place = place_of(args)
    if place.dtype != torch.float32:
        parser.error("--dtype: sizes are of float32 and bfloat16, times of float32 alone; leave it out")
    print(f"{args.shape} shape, LoRA r={RANK} on query/key/value; {place.describe()}\n")
    table = sizes(args.shape)
    print_table(["dtype", "kept", "ordinary, bytes", "sparse, bytes", "share", "limit", ""], table)
    print()
    header = ["kept", "as written", "one bit an entry", "varint gaps", "4-byte positions", "least possible"]
    print_table(header, places(args.shape))
    print()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, _, _ = first_adapter(args.shape, KEEP, torch.float32, folder)
        files = [folder / f"{number}.safetensors" for number in range(args.sparse)]
        for number, file in enumerate(files):
            write_sparse_adapter(another(first, number), file)
        folders = [folder / f"ordinary{number}" for number in range(args.ordinary)]
        for file, ordinary in zip(files, folders, strict=False):
            write_adapter_folder(file, ordinary)
        sparse_disk = sum(file.stat().st_size for file in files)
        ordinary_disk = sum((each / "adapter_model.safetensors").stat().st_size for each in folders)
        sparse, sparse_load = add_all(args, files)
        dense, dense_load = load_all(args, folders)

    sparse_switch = [timed(place, lambda n=n: set_sparse_adapter(sparse, str(n)))[0] for n in range(args.sparse)]
    dense_switch = [
        timed(place, lambda n=n: dense.set_adapter(str(n), inference_mode=True))[0]
        for _ in range(3)
        for n in range(args.ordinary)
    ]
    ids = torch.arange(1000, 1032, device=args.device)[None]
    for number in range(min(10, args.ordinary)):
        set_sparse_adapter(sparse, str(number))
        dense.set_adapter(str(number), inference_mode=True)
        with torch.no_grad():
            if not torch.equal(sparse(ids).last_hidden_state, dense(ids).last_hidden_state):
                raise SystemExit(f"Adapter {number}: the outputs differ.")

    state = sparse._fish_tuning_sparse_adapters
    resident = sum(p.numel() * p.element_size() for n, p in sparse.named_parameters() if "lora_" in n)
    held = resident + sum(
        each.values.nbytes + (each.places.nbytes if each.places is not None else 0)
        for adapter in state.adapters.values()
        for each in adapter.entries
    )
    times = args.sparse / args.ordinary
    dense_held = sum(p.numel() * p.element_size() for n, p in dense.named_parameters() if "lora_" in n)
    print_table(
        ["", "adapters", f"disk of {args.sparse:,}", f"memory of {args.sparse:,}", "ms to load one (min/median/max)",
         f"s to load {args.sparse:,}", "ms to switch (min/median/max)"],
        [
            ["sparse", f"{args.sparse:,}", f"{sparse_disk / 2**20:,.1f} MiB", f"{held / 2**20:,.1f} MiB",
             milliseconds(sparse_load[1:]), f"{sum(sparse_load):,.1f}", milliseconds(sparse_switch)],
            ["ordinary", f"{args.ordinary:,}", f"{times * ordinary_disk / 2**20:,.1f} MiB*",
             f"{times * dense_held / 2**20:,.1f} MiB*", milliseconds(dense_load[1:]),
             f"{times * sum(dense_load):,.1f}*", milliseconds(dense_switch)],
        ],
    )  # fmt: skip
    print("\n* multiplied; the outputs of both are bit-equal")
    kept = verdict("median switch, ms", median(sparse_switch) * 1e3, 10, at_most=True)
    return 0 if kept and all(row[-1] == "kept" for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
