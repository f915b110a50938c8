from __future__ import annotations

from datasets import Dataset

from fish_tuning.experiments.data.digests import data_digest

ROWS = {"input_ids": [[1, 2], [3], [4, 5]], "labels": [0, 1, 0]}


def test_the_same_content_has_the_same_digest_wherever_it_comes_from() -> None:
    data = Dataset.from_dict(ROWS)
    longer = Dataset.from_dict({key: [*values, values[0]] for key, values in ROWS.items()})
    assert data_digest(data) == data_digest(longer.select(range(3))) == data_digest(data.select([0, 1, 2]))


def test_content_and_order_count() -> None:
    data = Dataset.from_dict(ROWS)
    digests = {data_digest(data), data_digest(data.select([1, 0, 2])), data_digest(data.select([0, 1])),
               data_digest(data, data), data_digest(Dataset.from_dict({**ROWS, "labels": [0, 1, 1]}))}  # fmt: skip
    assert len(digests) == 5
