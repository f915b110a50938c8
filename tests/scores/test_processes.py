"""Two processes score together what one scores alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.data_loader import prepare_data_loader  # type: ignore[import-untyped]
from datasets.distributed import split_dataset_by_node
from device import DEVICE
from processes import once_in_two_processes
from tiny import assert_scores_close, bert, classification_batch, lora, rebatch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from fish_tuning import (
    FisherError,
    calculate_fisher_information,
    calculate_scores,
    create_mask_from_fisher,
    measure_moments,
)
from fish_tuning.scores.processes import Processes

BATCH = classification_batch((5, 9, 3, 7, 9, 4, 8, 6, 9, 5))
# The processes compute on the CPU, and a GPU rounds otherwise.
ROUNDING = 1e-6 if DEVICE.type == "cpu" else 1e-5
ROWS = [{key: value[row] for key, value in BATCH.items()} for row in range(10)]


UNEVEN = ROWS[:7]  # what fills up the parts of two processes would be counted twice


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(UNEVEN)


class PicksByRank(Stream):
    def __init__(self, rank: int) -> None:
        self.rows = [UNEVEN[:4], UNEVEN[4:]][rank]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def streamed() -> Any:
    rows = [{key: value.tolist() for key, value in row.items()} for row in UNEVEN]
    return datasets.Dataset.from_list(rows).with_format("torch")


def split_streams(rank: int) -> dict[str, Any]:
    """Of `datasets`, which leave no class of a sampler; of two shards, of one, and by accelerate."""
    prepared = {"num_processes": 2, "process_index": rank}
    two, one = streamed().to_iterable_dataset(num_shards=2), streamed().to_iterable_dataset()
    return {
        "shards": DataLoader(split_dataset_by_node(two, rank, 2), batch_size=2),
        "examples": DataLoader(split_dataset_by_node(one, rank, 2), batch_size=2),
        "accelerate's shards": prepare_data_loader(DataLoader(two, batch_size=2), **prepared),
        "accelerate's examples": prepare_data_loader(DataLoader(one, batch_size=2), **prepared),
    }


def uneven_parts(rank: int) -> dict[str, Any]:
    prepared = {"num_processes": 2, "process_index": rank}
    return {
        "sampler": DataLoader(UNEVEN, batch_size=2, sampler=DistributedSampler(UNEVEN, shuffle=False)),  # type: ignore[arg-type]
        "shard": prepare_data_loader(DataLoader(UNEVEN, batch_size=2), **prepared),  # type: ignore[arg-type]
        "stream": prepare_data_loader(DataLoader(Stream(), batch_size=2), **prepared),
        "dispatched": prepare_data_loader(
            DataLoader(Stream(), batch_size=2),
            torch.device("cpu"),
            put_on_device=True,
            dispatch_batches=True,
            **prepared,
        ),
    }


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(ROWS, batch_size=2, **options)  # type: ignore[arg-type]


def broken_collator(rows: Any) -> Any:
    raise FisherError("this row cannot be read")


def message_of(rank: int, batches: Any, **options: Any) -> str:
    try:
        calculate_fisher_information(lora(bert()), batches, progress=False, **options)
    except FisherError as error:
        return str(error)
    return "no error"


def worker(rank: int, folder: Path) -> dict[str, Any]:
    PartialState(cpu=True)  # before accelerate makes one that knows of no other process
    odd = rebatch(BATCH, 4)  # three batches, of four, four and two examples
    broken = [dict(batch) for batch in odd]
    if rank == 1:
        broken[1]["labels"] = broken[1]["labels"] + 100
    options: dict[str, Any] = {"progress": False}
    results: dict[str, Any] = {
        "same loader": measure_moments(lora(bert()), odd, **options).mean_gradients
        | {"squares": measure_moments(lora(bert()), odd, **options).mean_squares},
        "num_samples": calculate_fisher_information(lora(bert()), odd, num_samples=7, **options),
        "drawn labels": calculate_fisher_information(lora(bert()), odd, fisher_type="sampled", **options),
        "one batch": calculate_fisher_information(lora(bert()), [BATCH], **options),
        "distributed sampler": calculate_fisher_information(
            lora(bert()),
            loader(sampler=DistributedSampler(ROWS, shuffle=False)),
            warmup_steps=0,
            **options,  # type: ignore[arg-type]
        ),
        "accelerate": calculate_fisher_information(
            lora(bert()), prepare_data_loader(loader(), num_processes=2, process_index=rank), warmup_steps=0, **options
        ),
        "uneven parts": {
            how: (moments.num_samples, moments.mean_squares)
            for how, part in uneven_parts(rank).items()
            for moments in [measure_moments(lora(bert()), part, warmup_steps=0, **options)]
        },
        "some of uneven parts": {
            (how, number): measure_moments(
                lora(bert()), part, num_samples=number, warmup_steps=0, **options
            ).num_samples
            for number in (1, 3, 6)
            for how, part in uneven_parts(rank).items()
            if how != "sampler"
        },
        "part of a sharded loader": measure_moments(
            lora(bert()),
            loader(sampler=DistributedSampler(ROWS, shuffle=False)),
            num_samples=5,
            **options,  # type: ignore[arg-type]
        ).num_samples,
        "warm start": measure_moments(
            lora(bert()),
            loader(sampler=DistributedSampler(ROWS, shuffle=False)),
            warmup_steps=3,
            **options,  # type: ignore[arg-type]
        ).weights,
        "warm parts": {
            how: calculate_fisher_information(lora(bert(), init_lora_weights=True), part, **options)
            for how, part in uneven_parts(rank).items()
        },
        "split streams": {
            how: calculate_fisher_information(lora(bert(), init_lora_weights=True), part, **options)
            for how, part in split_streams(rank).items()
        },
        "already": {
            how: calculate_fisher_information(
                lora(bert(), init_lora_weights=True), part, split_between_processes="already", **options
            )
            for how, part in {
                "picks by rank": DataLoader(PicksByRank(rank), batch_size=2),
                "a list": rebatch({key: value[:7] for key, value in BATCH.items()}, 2)[2 * rank : 2 * rank + 2],
                "by node": DataLoader(split_dataset_by_node(streamed(), rank, 2), batch_size=2),
            }.items()
        },
        "not told of": message_of(rank, DataLoader(PicksByRank(rank), batch_size=2)),
        "some warm parts": calculate_fisher_information(
            lora(bert()), uneven_parts(rank)["sampler"], warmup_steps=3, num_samples=5, **options
        ),
        "a part that is broken while it warms up": message_of(
            rank,
            loader(sampler=DistributedSampler(ROWS, shuffle=False), collate_fn=broken_collator if rank else None),  # type: ignore[arg-type]
            warmup_steps=2,
        ),
        "mask": create_mask_from_fisher(calculate_scores(lora(bert()), odd, "gain", **options), keep_ratio=0.1),
        "alone": calculate_fisher_information(lora(bert()), odd, split_between_processes=False, **options)
        if rank == 0
        else {},
        "a part alone": measure_moments(
            lora(bert()), uneven_parts(rank)["sampler"], split_between_processes=False, warmup_steps=0, **options
        ).num_samples,
        "different": message_of(rank, rebatch(BATCH, 4 + rank)),
        "broken": message_of(rank, broken),
        "broken while it warms up": message_of(rank, broken, warmup_steps=2),
        "one without examples": message_of(
            rank, loader(sampler=DistributedSampler(ROWS, shuffle=False)), num_samples=1, warmup_steps=2
        ),  # type: ignore[arg-type]
    }
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return once_in_two_processes(worker, tmp_path_factory, "processes")


def alone(**options: Any) -> dict[str, Tensor]:
    return calculate_fisher_information(lora(bert()), rebatch(BATCH, 4), progress=False, **options)


def test_sums_are_those_of_one_process(results: list[dict[str, Any]]) -> None:
    moments = measure_moments(lora(bert()), rebatch(BATCH, 4), progress=False)
    for result in results:
        assert_scores_close(result["same loader"].pop("squares"), moments.mean_squares, tolerance=ROUNDING)
        for name, gradient in moments.mean_gradients.items():
            torch.testing.assert_close(result["same loader"][name], gradient.cpu(), rtol=1e-4, atol=1e-7)
        assert_scores_close(result["num_samples"], alone(num_samples=7), tolerance=ROUNDING)
        assert_scores_close(result["drawn labels"], alone(fisher_type="sampled"), tolerance=ROUNDING)
        assert_scores_close(result["one batch"], alone(), tolerance=1e-4)  # the other process has nothing to do


@pytest.mark.parametrize("how", ["distributed sampler", "accelerate"])
def test_a_loader_that_gives_each_its_part_is_taken_as_it_is(how: str, results: list[dict[str, Any]]) -> None:
    for result in results:
        assert_scores_close(result[how], alone(warmup_steps=0), tolerance=1e-5)
        assert result["part of a sharded loader"] == 5


def test_no_example_is_counted_twice(results: list[dict[str, Any]]) -> None:
    rows = {key: value[:7] for key, value in BATCH.items()}
    reference = calculate_fisher_information(lora(bert()), [rows], warmup_steps=0, progress=False)
    for result in results:
        for how, (number, squares) in result["uneven parts"].items():
            assert number == 7, how
            assert_scores_close(squares, reference, tolerance=1e-5)
        assert result["a part alone"] == (4 if result is results[0] else 3)
        for (how, number), found in result["some of uneven parts"].items():
            assert found == number, how


def test_all_warm_up_on_what_one_process_would(results: list[dict[str, Any]]) -> None:
    rows = [{key: value[:number] for key, value in BATCH.items()} for number in (7, 5)]
    reference = calculate_fisher_information(lora(bert(), init_lora_weights=True), rows[:1], progress=False)
    some = calculate_fisher_information(lora(bert()), rows[1:], warmup_steps=3, progress=False)
    for result in results:
        for how in ("warm parts", "split streams", "already"):
            for scores in result[how].values():
                assert_scores_close(scores, reference, tolerance=1e-5)
        assert_scores_close(result["some warm parts"], some, tolerance=1e-5)


def test_seeds_of_drawn_labels_fit_however_many_processes_there_are() -> None:
    for number in (1, 2, 17, 5000):
        processes = Processes([], split=False, device=torch.device("cpu"))
        processes.number, processes.has_own_part = number, True
        firsts = [processes.first_example(0, rank) for rank in range(number)]
        assert len(set(firsts)) == number
        torch.Generator().manual_seed(2**62 + (1 + firsts[-1] + 10**6) * 2**20)


def test_all_processes_get_the_same_to_the_bit(results: list[dict[str, Any]]) -> None:
    for what in ("one batch", "distributed sampler", "accelerate", "warm start", "mask"):
        assert results[0][what], what
        for name, tensor in results[0][what].items():
            assert torch.equal(tensor, results[1][what][name]), (what, name)


def test_a_process_may_score_by_itself(results: list[dict[str, Any]]) -> None:
    assert_scores_close(results[0]["alone"], alone(), tolerance=ROUNDING)


def test_no_process_waits_for_one_that_failed(results: list[dict[str, Any]]) -> None:
    assert "Process 1 of 2 failed while scoring: FisherError" in results[0]["broken"]
    assert "label" in results[1]["broken"]
    assert "Process 1 of 2 failed while scoring: FisherError" in results[0]["broken while it warms up"]
    assert "label" in results[1]["broken while it warms up"]
    assert "Process 1 of 2 failed" in results[0]["a part that is broken while it warms up"]
    assert results[1]["a part that is broken while it warms up"] == "this row cannot be read"
    assert [result["one without examples"] for result in results] == ["no error"] * 2


def test_what_cannot_be_shared_out_is_refused(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert "different batches" in result["different"]
        assert "split_between_processes='already' where" in result["not told of"]
    with pytest.raises(FisherError, match="'parts' must be True, False or 'already'"):
        alone(split_between_processes="parts")
