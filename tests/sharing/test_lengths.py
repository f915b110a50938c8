"""Lengths that texts are cut to."""

from __future__ import annotations

from pathlib import Path

import pytest

from fish_tuning import ConfigurationError
from fish_tuning.sharing.predicting import predict


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (2, "--max-length=2 leaves no room for a text beside the 2 tokens .* set it to 3 or more"),
        (10_000, r"--max-length=10000 is more than the \d+ positions of the model; set it to \d+ or less"),
    ],
)
def test_a_length_that_cannot_be_cut_to_is_refused(adapter: Path, length: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        predict(adapter, [{"text": "good film"}], max_length=length)
    assert predict(adapter, [{"text": "good film"}], max_length=3)
