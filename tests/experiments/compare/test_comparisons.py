"""Paired comparisons over tasks and seeds, against numbers worked out by hand or by scipy."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from fakes import failed, ok, scores
from fuzz import settings
from hypothesis import given
from hypothesis import strategies as st

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.compare import paired
from fish_tuning.experiments.compare.comparisons import (
    SIGNIFICANT,
    Comparison,
    choice_pairs,
    compare,
    compare_by_task,
    dense_pairs,
)
from fish_tuning.experiments.compare.paired import estimate, holm
from fish_tuning.experiments.compare.pairs import unique_runs
from fish_tuning.experiments.compare.summaries import mean_interval
from fish_tuning.experiments.records.run_record import RunRecord

_GAINS = (("lora", 0.0), ("lora-fish", 0.1))
UP_6 = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]


def differing(differences: Sequence[float], task: str = "", arm: str = "lora-fish") -> list[RunRecord]:
    """Runs of `lora` that reach 0.5 with every seed, and of `arm` that reach so much more."""
    values = [0.5 + difference for difference in differences]
    return [*scores("lora", [0.5] * len(values), task=task), *scores(arm, values, task=task)]


def one(runs: Sequence[RunRecord]) -> Comparison:
    (comparison,) = compare(runs)
    return comparison


def test_interval_of_one_task_is_students_t_of_the_differences() -> None:
    comparison = one(differing([0.01, 0.05, -0.02, 0.04]))
    expected = mean_interval([0.01, 0.05, -0.02, 0.04])
    assert (comparison.mean_difference, comparison.low, comparison.high) == pytest.approx(
        (expected.mean, expected.low, expected.high)
    )


def test_arms_of_a_count_are_compared_with_every_dense_arm_of_it() -> None:
    kept = {
        "value1": 64, "output1": 64, "pool": 768, "value_top": 32, "head": 0,
        "pool-fish@n64": 64, "pool-fish@n32": 32, "other-fish@n64": 64, "pool-fish@0.5": 384,
    }  # fmt: skip
    runs = [ok(arm, 1, 0.5, kept_parameters=number) for arm, number in kept.items()]
    runs += [failed("value1", 2), ok("output1", 1, 0.5, kept_parameters=99, task="of another model")]
    assert dense_pairs(runs) == [
        ("pool-fish@n64", "value1"), ("pool-fish@n64", "output1"), ("pool-fish@n64", "pool"),
        ("pool-fish@n32", "pool"), ("pool-fish@n32", "value_top"),
        ("other-fish@n64", "value1"), ("other-fish@n64", "output1"), ("pool-fish@0.5", "pool"),
    ]  # fmt: skip


def test_choices_are_compared_at_the_same_budget_of_the_same_method() -> None:
    arms = ["lora", "lora-fish@0.1", "lora-fish@0.01", "lora-fish-rand@0.1", "lora-fish-rev@0.01", "dora-fish-rand@0.1"]
    assert choice_pairs(arms) == [
        ("lora-fish@0.1", "lora-fish-rand@0.1"),
        ("lora-fish@0.01", "lora-fish-rev@0.01"),
    ]
    variants = ["lora-fish-quota", "lora-fish", "lora-fish-norm", "lora-fish-rand"]
    assert choice_pairs(variants) == [(arm, "lora-fish-rand") for arm in variants[:3]]
    assert choice_pairs(["lora", "dora"]) == []
    # The reverse belongs to the method's own score.
    assert choice_pairs(["lora-gain", "lora-fish", "lora-fish-rand", "lora-fish-rev", "lora-magnitude"]) == [
        ("lora-fish", "lora-fish-rand"), ("lora-gain", "lora-fish-rand"), ("lora-magnitude", "lora-fish-rand"),
        ("lora-fish", "lora-fish-rev"), ("lora-gain", "lora-fish"), ("lora-magnitude", "lora-fish"),
    ]  # fmt: skip


def test_difference_that_is_lost_in_the_noise_is_no_win() -> None:
    comparison = one(differing([0.3, -0.2, 0.25, -0.1, 0.2, -0.15]))
    assert comparison.mean_difference is not None
    assert comparison.mean_difference > 0
    assert comparison.verdict == "no difference shown"
    assert comparison.reason is None


def test_only_runs_that_finished_in_both_arms_are_paired() -> None:
    runs = [ok("lora", 1, 0.5), failed("lora", 2), ok("lora", 3, 0.5), ok("lora", 4, math.nan), ok("lora", 5, 0.5)]
    runs += [ok("lora-fish", 1, 0.6), ok("lora-fish", 2, 0.9), ok("lora-fish", 3, 0.4), ok("lora-fish", 4, 0.9)]
    runs += [ok("lora-fish", 5, math.inf), ok("lora-fish", 6, 0.9), replace(ok("lora-fish", 7, 0.9), value=None)]
    stopped = replace(ok("lora-fish", 8, 0.9), status="failed")  # after its first evaluation
    runs += [ok("lora", 7, 0.5), ok("lora", 8, 0.5), stopped]
    comparison = one(runs)
    assert (comparison.n, comparison.wins, comparison.losses) == (2, 1, 1)
    assert comparison.mean_difference == pytest.approx(0.0)


def test_same_seed_on_different_tasks_is_not_a_pair() -> None:
    runs = [*scores("lora", [0.5] * 3, task="cola"), *scores("lora-fish", [0.6] * 3, task="rte")]
    assert one(runs).verdict == "no pairs"
    comparison = one([*runs, *differing(UP_6, "sst2")])
    assert (comparison.tasks, comparison.missing_tasks) == (("sst2",), ("cola", "rte"))
    assert comparison.reason == "No pair in cola, rte."


def test_metric_is_the_common_one() -> None:
    matthews = [replace(run, metric="matthews_correlation") for run in differing(UP_6, "cola")]
    assert one(differing(UP_6, "rte")).metric == "accuracy"
    assert one(matthews).metric == "matthews_correlation"
    assert one([*matthews, *differing(UP_6, "rte")]).metric == "score"


def test_default_pairs_are_each_arm_with_the_dense_arm_of_its_method() -> None:
    arms = ["lora", "lora-fish", "lora-fish-rand", "lora-fish@0.1", "dora", "dora-fish"]
    runs = [run for arm in arms for run in scores(arm, [0.5, 0.6, 0.7])]
    assert [(c.arm, c.baseline) for c in compare(runs)] == [
        ("lora-fish", "lora"),
        ("lora-fish-rand", "lora"),
        ("lora-fish@0.1", "lora"),
        ("dora-fish", "dora"),
    ]
    chosen = [("lora-fish", "lora-fish-rand"), ("dora", "lora")]
    assert [(c.arm, c.baseline) for c in compare(runs, iter([*chosen, chosen[0]]))] == chosen


def test_holm_by_hand() -> None:
    # 4 * 0.005 = 0.02; 3 * 0.01 = 0.03; 2 * 0.03 = 0.06; 0.04 is less than the one before, so 0.06.
    decisions = holm([0.01, 0.04, 0.03, 0.005])
    assert [each.p_corrected for each in decisions] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [each.significant for each in decisions] == [True, False, False, True]
    assert [each.level for each in decisions] == pytest.approx([0.05 / 3, 0.05 / 2, 0.05 / 2, 0.05 / 4])
    assert [each.p_corrected for each in holm([0.4, 0.6])] == pytest.approx([0.8, 0.8])
    assert [each.p_corrected for each in holm([0.9, 0.8])] == [1.0, 1.0]
    assert holm([]) == []


@settings(max_examples=200)
@given(p=st.lists(st.floats(0, 1), max_size=8), alpha=st.floats(0.001, 0.5))
def test_holm_decides_as_its_corrected_p_and_its_levels_say(p: list[float], alpha: float) -> None:
    for each, value in zip(holm(p, alpha), p, strict=True):
        assert each.significant == (each.p_corrected <= alpha) == (value <= each.level)


def test_estimate_of_one_task_is_a_paired_t_test() -> None:
    from scipy.stats import ttest_1samp

    values = [0.01, 0.05, -0.02, 0.04, 0.03]
    slow = ttest_1samp(values, 0.0)
    found = estimate([values])
    assert found is not None
    assert found.p == pytest.approx(slow.pvalue)
    assert found.interval(0.1) == pytest.approx(tuple(slow.confidence_interval(0.9)))


def test_estimate_of_two_tasks_is_welchs_with_fewer_degrees(monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.stats import ttest_ind

    reduced = estimate([[0.01, 0.05, -0.02, 0.04], [0.3, 0.1, 0.25]])
    monkeypatch.setattr(paired, "REDUCTION", 1.0)

    first, second = [0.01, 0.05, -0.02, 0.04], [0.3, 0.1, 0.25]
    # The sum of two means is the difference to the mirrored second, for which scipy has Welch's test.
    welch = ttest_ind(first, [-value for value in second], equal_var=False)
    bounds = welch.confidence_interval(0.9)
    found = estimate([first, second])
    assert found is not None
    assert reduced is not None
    assert reduced.degrees == pytest.approx(max(2, 0.85 * found.degrees))
    assert found.p == pytest.approx(welch.pvalue)
    assert found.interval(0.1) == pytest.approx((bounds.low / 2, bounds.high / 2))
    # A task without spread adds no error; tasks that are equally noisy add their degrees of freedom: t(.975, 4).
    steady = estimate([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    assert steady is not None
    assert steady.interval(0.05) == pytest.approx(
        (3.5 - 4.302653 / math.sqrt(3) / 2, 3.5 + 4.302653 / math.sqrt(3) / 2)
    )


def test_nothing_is_estimated_without_spread() -> None:
    assert estimate([]) is None
    assert estimate([[0.1]]) is None
    assert estimate([[0.1, 0.2], [0.3]]) is None
    assert estimate([[0.3, 0.1 + 0.2, 0.3]]) is None  # 0.1 + 0.2 is not 0.3 in binary


VALUES = st.floats(-1, 1).map(lambda value: round(value, 4))


@settings(max_examples=100)
@given(
    data=st.lists(  # arms, tasks, seeds
        st.lists(st.lists(VALUES, min_size=1, max_size=5), min_size=1, max_size=3), min_size=1, max_size=5
    ),
    confidence=st.sampled_from([0.8, 0.95, 0.99]),
)
def test_interval_p_and_verdict_say_the_same(data: list[list[list[float]]], confidence: float) -> None:
    runs = []
    for number, tasks in enumerate(data):
        for task, values in enumerate(tasks):
            runs += scores(f"lora-fish@0.{number}", values, task=f"t{task}")
            runs += scores("lora", [0.0] * 5, task=f"t{task}")
    for family in (compare(runs, confidence=confidence), [c for _, c in compare_by_task(runs, confidence=confidence)]):
        for each in family:
            tested = each.low is not None and each.high is not None
            assert tested == (each.p_corrected is not None)
            leaves_out_zero = tested and (each.low > 0 or each.high < 0)  # type: ignore[operator]
            assert leaves_out_zero == (each.verdict in SIGNIFICANT)
            assert leaves_out_zero == (tested and each.p_corrected <= 1 - confidence)  # type: ignore[operator]
            if tested:
                assert each.low <= each.raw_low <= each.mean_difference + 1e-9  # type: ignore[operator]
                assert each.mean_difference - 1e-9 <= each.raw_high <= each.high  # type: ignore[operator]


def test_steady_gain_is_better_and_steady_loss_is_worse() -> None:
    gain = one(differing(UP_6))
    loss = one(differing([-difference for difference in UP_6]))
    assert (gain.verdict, loss.verdict) == ("better", "worse")
    assert gain.p == gain.p_corrected == pytest.approx(0.005934, abs=1e-5)
    assert (gain.low, gain.high) == (gain.raw_low, gain.raw_high)  # one comparison: nothing to correct for
    assert (gain.wins, gain.ties, gain.losses, gain.reason) == (6, 0, 0, None)
    assert (loss.wins, loss.ties, loss.losses) == (0, 0, 6)


def test_three_seeds_can_be_enough() -> None:
    comparison = one(differing([0.10, 0.11, 0.12]))
    assert comparison.verdict == "better"
    assert comparison.low == pytest.approx(0.11 - 4.302653 * 0.01 / math.sqrt(3))


def test_correction_takes_a_win_back_and_widens_its_interval() -> None:
    noise = [0.03, -0.02, 0.04, -0.05, 0.01, -0.02, 0.02, -0.03]
    gain = [0.05, 0.02, 0.08, -0.02, 0.09, -0.01, 0.05, 0.03]
    alone = one(differing(gain))
    others = [run for n in range(4) for run in differing(noise, arm=f"lora-fish@0.{n}") if run.arm != "lora"]
    of_five = compare([*differing(gain), *others])[0]
    assert (alone.verdict, of_five.verdict) == ("better", "no difference shown")
    assert alone.p == of_five.p
    assert of_five.p_corrected == pytest.approx(5 * alone.p)  # type: ignore[operator]
    assert of_five.low < 0 < alone.low  # type: ignore[operator]
    assert (of_five.raw_low, of_five.raw_high) == (alone.low, alone.high)


def test_by_task_all_are_corrected_for_each_other() -> None:
    runs = [run for task in ("a", "b", "c", "d") for run in differing([*UP_6, 0.07], task)]
    found = compare_by_task(runs)
    assert [task for task, _ in found] == ["a", "b", "c", "d"]
    alone = one(differing([*UP_6, 0.07]))
    for _, each in found:
        assert each.p == alone.p
        assert each.p_corrected == pytest.approx(4 * alone.p)  # type: ignore[operator]
    only_there = [*runs, *scores("lora-fish-rand", [0.5] * 7, task="b")]
    pairs = [("lora-fish", "lora-fish-rand")]
    assert [(task, each.baseline) for task, each in compare_by_task(only_there, pairs)] == [("b", "lora-fish-rand")]


@pytest.mark.parametrize(("n", "seeds"), [(1, "1 seed"), (2, "2 seeds")])
def test_fewer_than_three_seeds_give_no_interval(n: int, seeds: str) -> None:
    comparison = one(differing(UP_6[:n]))
    assert (comparison.low, comparison.high, comparison.p, comparison.n, comparison.n_seeds) == (None, None, None, n, n)
    assert comparison.verdict == "too few seeds"
    assert comparison.reason == f"{seeds}; at least 3 are needed."


def test_two_seeds_on_one_of_many_tasks_are_too_few() -> None:
    comparison = one([*differing(UP_6, "cola"), *differing(UP_6[:2], "rte")])
    assert (comparison.n, comparison.n_seeds, comparison.low) == (8, 2, None)
    assert comparison.verdict == "too few seeds"
    assert comparison.reason == "2 seeds in the task that has the fewest; at least 3 are needed."


def test_arm_without_any_pair() -> None:
    for runs in ([ok("lora-fish", 1, 0.5)], [ok("lora", 1, 0.5), failed("lora-fish", 1)]):
        comparison = one(runs)
        assert (comparison.n, comparison.n_seeds, comparison.mean_difference) == (0, 0, None)
        assert (comparison.p, comparison.p_corrected) == (None, None)
        assert comparison.verdict == "no pairs"
        assert comparison.reason == "No seed finished in both lora-fish and lora of one experiment."
    both = compare([*differing(UP_6), failed("lora-fish@0.1", 1)])
    assert both[0].p_corrected == both[0].p  # what was not tested corrects nothing
    assert both[1].p_corrected is None
    assert compare([]) == compare(scores("lora", [0.5])) == []


def test_equal_pairs_and_steady_differences_have_no_interval() -> None:
    # 0.1 + 0.2 is not 0.3 in binary: a tie all the same.
    equal = one([*scores("lora", [0.3, 0.5, 0.6]), *scores("lora-fish", [0.1 + 0.2, 0.5, 0.6])])
    assert (equal.verdict, equal.p, equal.ties, equal.low, equal.reason) == ("all pairs equal", None, 3, None, None)
    steady = one([*scores("lora", [0.1] * 6), *scores("lora-fish", [0.4] * 6)])
    assert (steady.low, steady.verdict) == (None, "no spread")
    assert steady.reason == "Every seed gave the same difference, which says nothing about their spread."


def test_tasks_weigh_the_same_whatever_their_seeds() -> None:
    runs = [*differing([0.1] * 2 + [0.4], "cola"), *differing([-0.3, -0.2, -0.1, -0.2, -0.2, -0.2], "rte")]
    comparison = one(runs)
    assert comparison.tasks == ("cola", "rte")
    assert comparison.mean_difference == pytest.approx((0.2 - 0.2) / 2)  # over the pairs it would be -0.067
    assert (comparison.n, comparison.n_seeds, comparison.wins, comparison.losses) == (9, 3, 3, 6)


def test_invariances() -> None:
    generator = random.Random(0)
    tasks = {"cola": 4, "rte": 7}
    runs = [
        ok(arm, seed, 0.5 + generator.gauss(shift, 0.1), task=task)
        for task, n in tasks.items()
        for arm, shift in (("lora", 0.0), ("lora-fish", 0.07))
        for seed in range(n)
    ]
    (base,) = compare(runs)
    assert base.low is not None
    assert base.high is not None
    assert base.mean_difference is not None
    assert compare(runs) == compare(random.Random(1).sample(runs, len(runs))) == compare([*runs, *runs]) == [base]
    (swapped,) = compare(runs, [("lora", "lora-fish")])
    assert (swapped.p, swapped.wins, swapped.losses) == (pytest.approx(base.p), base.losses, base.wins)
    assert (swapped.mean_difference, swapped.low, swapped.high) == pytest.approx(
        (-base.mean_difference, -base.high, -base.low)
    )
    (narrower,) = compare(runs, confidence=0.5)
    assert narrower.raw_low is not None
    assert narrower.raw_low > base.low


def keyed(
    arm: str, values: Sequence[float], setting: str = "s", experiment: str = "x", first: int = 1
) -> list[RunRecord]:
    """Runs with keys, as today's runner writes them."""
    return [
        ok(
            arm,
            seed,
            value,
            task="rte",
            experiment=experiment,
            setting=f"{setting} {arm}",
            config_hash=f"{setting} {arm} {seed}",
        )
        for seed, value in enumerate(values, first)
    ]


def test_copies_of_an_experiment_count_once() -> None:
    runs = [*keyed("lora", [0.5, 0.6, 0.7]), *keyed("lora-fish", [0.6, 0.65, 0.85])]
    copies = [replace(run, experiment=name) for name in ("copy", "another") for run in runs]
    assert compare([*runs, *copies]) == compare(runs)
    assert one(runs).n == 3
    # what only the copy has is paired with what it shares with the first
    parts = [*keyed("lora", [0.5, 0.6, 0.7]), *(replace(run, experiment="copy") for run in runs)]
    assert one(parts).n == 3


def test_other_settings_are_no_further_seeds() -> None:
    runs = [*keyed("lora", [0.5, 0.6, 0.7]), *keyed("lora-fish", [0.6, 0.65, 0.85])]
    others = [
        *keyed("lora", [0.4, 0.5, 0.7], "lr 2", "y", 4),
        *keyed("lora-fish", [0.6, 0.65, 0.85], "lr 2", "y", 4),
    ]
    comparison = one([*runs, *others])
    assert (comparison.verdict, comparison.n, comparison.mean_difference) == ("settings differ", 0, None)
    assert "Runs on rte differ in more than their seeds and arms" in (comparison.reason or "")
    # nor do the other tasks give a verdict for it
    assert one([*runs, *others, *differing(UP_6, "cola")]).verdict == "settings differ"


def test_arms_that_were_trained_otherwise_are_no_pairs() -> None:
    dense, fish = (scores(arm, [0.5, 0.6, 0.7 + gain], common="a", method_own="m") for arm, gain in _GAINS)
    assert one([*dense, *fish]).n == 3
    for change in ({"common": "b"}, {"method_own": "n"}):
        comparison = one([*dense, *(replace(run, **change) for run in fish)])
        assert (comparison.verdict, comparison.n) == ("settings differ", 0)
    # with another method, whose arguments are its own, only what is of all arms counts
    other = scores("dora", [0.6, 0.7, 0.9], common="a", method_own="n")
    (comparison,) = compare([*dense, *other], [("dora", "lora")])
    assert comparison.n == 3


def test_further_seeds_under_the_same_setting_are_joined() -> None:
    runs = [*keyed("lora", [0.5, 0.6, 0.7]), *keyed("lora-fish", [0.6, 0.65, 0.85])]
    more = [
        *keyed("lora", [0.4, 0.5, 0.7], experiment="y", first=4),
        *keyed("lora-fish", [0.6, 0.65, 0.85], experiment="y", first=4),
    ]
    assert (one([*runs, *more]).n, one([*runs, *more]).n_seeds) == (6, 6)


def test_arms_of_different_experiments_are_no_pairs() -> None:
    runs = [*keyed("lora", [0.5, 0.6, 0.7]), *keyed("lora-fish", [0.6, 0.65, 0.85], experiment="y")]
    assert one(runs).verdict == "no pairs"


def test_one_task_with_two_models_has_no_verdict_over_both() -> None:
    small = differing(UP_6, "rte")
    large = [replace(run, model="large", experiment="y") for run in small]
    assert one([*small, *large]).verdict == "settings differ"


def test_a_seed_that_finished_twice_with_different_scores_is_a_contradiction() -> None:
    runs = [*differing(UP_6), ok("lora-fish", 1, 0.9)]
    assert one(runs).verdict == "settings differ"
    again = [*differing(UP_6), failed("lora-fish", 1)]  # a first attempt that failed is none
    assert compare(again) == compare(differing(UP_6))


def test_unique_runs_are_the_finished_ones() -> None:
    runs = [*scores("lora", [0.5, 0.6]), failed("lora", 3), ok("lora", 4, math.inf)]
    assert unique_runs([*runs, *runs]) == runs[:2]


def test_what_cannot_be_compared_is_refused() -> None:
    runs = differing(UP_6)
    with pytest.raises(ConfigurationError, match=r"no run of 'lora-fsh'.*Did you mean 'lora-fish'"):
        compare(runs, [("lora-fsh", "lora")])
    with pytest.raises(ConfigurationError, match=r"between 0 and 1.*it is 95"):
        compare(runs, confidence=95)


def test_one_task_at_a_half_and_five_at_nothing() -> None:
    """The statistic speaks of these tasks; whichever way it goes, interval and verdict agree."""
    runs = differing([0.49, 0.5, 0.51], "a")
    for task in "bcdef":
        runs += differing([0.001, -0.001, 0.0], task)
    comparison = one(runs)
    assert comparison.mean_difference == pytest.approx(0.5 / 6)
    assert comparison.verdict == "better"
    assert comparison.low > 0  # type: ignore[operator]
    assert [task for task, each in compare_by_task(runs) if each.verdict == "better"] == ["a"]
