from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import text_batch
from transformers import BatchEncoding

from fish_tuning import FisherError
from fish_tuning.scores.batches import (
    batch_size,
    calibration_batches,
    kept,
    on_cpu,
    one_by_one_is_as_fast,
    rows,
    rows_to_look_at,
    trim_padding,
)

CPU = torch.device("cpu")


def padded(lengths: tuple[int, ...] = (2, 4), extra: int = 3) -> dict[str, torch.Tensor]:
    return {key: torch.nn.functional.pad(value, (0, extra)) for key, value in text_batch(lengths).items()}


def test_batches_stop_in_the_middle_of_one() -> None:
    loader = [{"labels": torch.arange(4)}, {"labels": torch.arange(4, 8)}, {"labels": torch.arange(8, 12)}]
    given = [batch["labels"].tolist() for batch in calibration_batches(loader, CPU, 6)]
    assert given == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize("examples", [3, 4])
def test_no_batch_is_fetched_beyond_the_last_needed(examples: int) -> None:
    def loader():  # type: ignore[no-untyped-def]
        yield {"labels": torch.arange(4)}
        raise AssertionError("a second batch was fetched")

    assert len(list(calibration_batches(loader(), CPU, examples))) == 1
    assert not list(calibration_batches(loader(), CPU, 0))


def test_what_is_no_tensor_is_left_out() -> None:
    (batch,) = calibration_batches([BatchEncoding({"labels": torch.arange(2), "text": ["a", "b"]})], CPU, None)
    assert list(batch) == ["labels"]


def test_batches_must_be_mappings() -> None:
    with pytest.raises(FisherError, match="gave a list; it must give mappings"):
        list(calibration_batches([[torch.arange(2)]], CPU, None))  # type: ignore[list-item]
    with pytest.raises(FisherError, match=r"gave a str; .* \*\*calibration_of"):
        list(calibration_batches({"calibration_dataloader": []}, CPU, None))  # type: ignore[arg-type]


def test_what_is_kept_stays_when_its_tensors_are_filled_again() -> None:
    labels = torch.arange(2)
    (batch,) = calibration_batches([{"labels": labels}], CPU, None)
    copy = kept(batch)
    labels.fill_(7)
    assert batch["labels"].tolist() == [7, 7]
    for known in (copy["labels"], on_cpu(copy, "labels"), copy.on_cpu["labels"]):  # type: ignore[attr-defined]
        assert known is not None
        assert known.tolist() == [0, 1]


def test_pinned_memory_is_not_filled_again_before_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    event = SimpleNamespace(synchronize=lambda: told.append("waited"))
    stream = SimpleNamespace(record_event=lambda: told.append("copying") or event)
    monkeypatch.setattr("fish_tuning.scores.batches.placed", lambda tensor, device: tensor)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    loader = [{"labels": torch.arange(2)}] * 2
    for pinned, expected in ((True, ["copying", "batch", "waited"] * 2), (False, ["batch"] * 2)):
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor, pinned=pinned: pinned)
        for _ in calibration_batches(loader, torch.device("cuda"), None):
            told.append("batch")
        assert told == expected
        told.clear()


def test_batch_size_is_that_of_the_labels() -> None:
    assert batch_size({"position_ids": torch.zeros(1, 9), "labels": torch.zeros(4)}) == 4
    assert batch_size({"scale": torch.tensor(2.0), "x": torch.zeros(3, 2)}) == 3
    with pytest.raises(FisherError, match="no tensor with a batch dimension"):
        batch_size({"scale": torch.tensor(2.0)})


def test_rows_share_scalars() -> None:
    part = rows({"labels": torch.arange(4), "scale": torch.tensor(2.0)}, 1, 3)
    assert part["labels"].tolist() == [1, 2]
    assert part["scale"] == 2


def test_rows_refuse_tensors_that_do_not_run_along_the_batch() -> None:
    batch = {"labels": torch.arange(4), "position_ids": torch.zeros(1, 9)}
    assert rows(batch, 0, 4) == batch
    with pytest.raises(FisherError, match="'position_ids' has first dimension 1, the batch has 4 examples"):
        rows(batch, 0, 1)


def test_trailing_padding_goes_from_everything_along_the_tokens() -> None:
    batch = padded() | {"labels": torch.zeros(2, 7, dtype=torch.long)}
    trimmed = trim_padding(batch)
    assert all(value.shape == (2, 4) for value in trimmed.values())
    assert torch.equal(trimmed["input_ids"], batch["input_ids"][:, :4])


def test_leading_padding_goes_too() -> None:
    batch = {key: torch.nn.functional.pad(value, (3, 0)) for key, value in text_batch((2, 4), side="left").items()}
    assert torch.equal(trim_padding(batch)["input_ids"], batch["input_ids"][:, 3:])


def test_padding_of_some_rows_stays() -> None:
    batch = text_batch((2, 4), side="left")
    assert trim_padding(batch)["input_ids"].shape == (2, 4)


def test_labels_of_examples_stay() -> None:
    trimmed = trim_padding(padded() | {"labels": torch.arange(2)})
    assert trimmed["labels"].tolist() == [0, 1]
    assert trimmed["input_ids"].shape == (2, 4)


def test_as_many_classes_as_columns_are_no_tokens() -> None:
    batch = padded() | {"labels": torch.zeros(2, 7)}  # one float for each of seven classes
    assert trim_padding(batch)["labels"].shape == (2, 7)


def test_unknown_tensor_as_wide_as_the_tokens_keeps_the_batch_whole() -> None:
    batch = padded() | {"bbox": torch.zeros(2, 7, 4)}
    trimmed = trim_padding(batch)
    assert trimmed["bbox"].shape[1] == trimmed["input_ids"].shape[1] == 7


@pytest.mark.parametrize("mask", [torch.zeros(2, 7), torch.ones(2, 1, 7, 7)])
def test_masks_that_tell_nothing(mask: torch.Tensor) -> None:
    batch = padded() | {"attention_mask": mask}
    assert trim_padding(batch)["input_ids"].shape == (2, 7)


@pytest.mark.parametrize(
    ("size", "tokens", "on_cpu", "on_gpu"),
    [(1, 8, True, True), (1, 600, True, True), (4, 512, True, False), (4, 511, False, False), (5, 600, False, False)],
)
def test_which_batches_are_scored_one_by_one(size: int, tokens: int, on_cpu: bool, on_gpu: bool) -> None:
    batch = {"input_ids": torch.zeros(size, tokens, dtype=torch.long), "labels": torch.zeros(size)}
    assert one_by_one_is_as_fast(batch) == one_by_one_is_as_fast(batch, gpu=False) == on_cpu
    assert one_by_one_is_as_fast(batch, gpu=True) == on_gpu
    images = {"pixel_values": torch.zeros(size, 3, tokens, 2), "labels": torch.zeros(size)}
    assert one_by_one_is_as_fast(images) == (size == 1)


def test_rows_to_look_at_are_drawn_of_those_that_tell_most() -> None:
    mask = (torch.arange(6) < torch.tensor([6, 3, 3, 2, 5])[:, None]).long()
    labels = torch.zeros(5, 6, dtype=torch.long)
    labels[3] = -100  # whose loss would tell nothing
    batch = {"input_ids": mask, "attention_mask": mask, "labels": labels}
    drawn = [rows_to_look_at(batch, 3, seed) for seed in range(40)]
    assert {found[0] for found in drawn} == {1, 2}, "the shortest with a label"
    assert {row for found in drawn for row in found} == {0, 1, 2, 4}
    assert all(len(set(found)) == 3 for found in drawn)
    assert {rows_to_look_at(batch, 1, seed, shortest=False)[0] for seed in range(40)} == {0, 1, 2, 4}
    assert rows_to_look_at(batch, 3, 7) == rows_to_look_at(batch, 3, 7)
    assert sorted(rows_to_look_at({"labels": torch.arange(3)}, 5, 0)) == [0, 1, 2]
