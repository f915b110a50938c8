"""Shares of kept entries, and how they are written."""

from __future__ import annotations

import pytest
from fakes import kept, ok

from fish_tuning.experiments.records.run_record import KeptShare
from fish_tuning.experiments.report.shares import factor_shares, mean_shares, percent


def test_a_weight_counts_with_its_bias() -> None:
    shares = [KeptShare(0, "dense", 10, 10), KeptShare(0, "dense", 0, 90)]
    assert mean_shares([ok("lora-fish", 1, 0.5, kept=shares)]) == {(0, "dense"): 0.1}


def test_shares_are_means_over_runs() -> None:
    runs = [ok("lora-fish", seed, 0.5, kept=kept(first, 9)) for seed, first in ((1, 1), (2, 3))]
    assert mean_shares(runs) == {(0, "query.lora_A"): pytest.approx(0.2), (1, "query.lora_B"): pytest.approx(0.9)}
    assert mean_shares([]) == {}


def test_a_module_without_entries_keeps_nothing() -> None:
    assert mean_shares([ok("lora-fish", 1, 0.5, kept=[KeptShare(0, "empty", 0, 0)])]) == {(0, "empty"): 0.0}


def test_factors_are_those_of_lora() -> None:
    shares = [*kept(1, 9), *kept(2, 8), KeptShare(0, "classifier", 5, 5)]
    assert factor_shares(shares) == {"A": (3, 20), "B": (17, 20)}
    assert factor_shares([KeptShare(0, "query", 1, 2)]) == {}


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0"), (1, "100"), (0.0001, "<0.1"), (0.9999, ">99"), (0.042, "4.2"), (0.42, "42")]
)
def test_percent_says_nothing_and_all_only_where_it_is_so(share: float, text: str) -> None:
    assert percent(share) == text
