"""Paired comparisons over tasks and seeds, against numbers worked out by hand or by scipy."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from fakes import failed, ok, scores

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.compare.comparisons import (
    Comparison,
    choice_pairs,
    compare,
    compare_by_task,
    label,
)
from fish_tuning.experiments.compare.paired_tests import (
    EXACT,
    MONTE_CARLO,
    bootstrap_interval,
    holm,
    sign_flip_p,
    stratified_interval,
)
from fish_tuning.experiments.compare.summaries import mean_interval
from fish_tuning.experiments.records.run_record import RunRecord

UP_6 = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]


def differing(differences: Sequence[float], task: str = "", arm: str = "lora-fish") -> list[RunRecord]:
    """Runs of `lora` that reach 0.5 with every seed, and of `arm` that reach so much more."""
    values = [0.5 + difference for difference in differences]
    return [*scores("lora", [0.5] * len(values), task=task), *scores(arm, values, task=task)]


def one(runs: Sequence[RunRecord]) -> Comparison:
    (comparison,) = compare(runs)
    return comparison


def slow_p(by_task: Sequence[Sequence[float]]) -> float:
    """Every sign pattern, one after the other."""

    def distance(signs: Sequence[int]) -> float:
        left = iter(signs)
        return abs(sum(sum(d * next(left) for d in values) / len(values) for values in by_task))

    n = sum(map(len, by_task))
    hits = [distance(signs) >= distance([1] * n) - 1e-9 for signs in itertools.product([1, -1], repeat=n)]
    return sum(hits) / len(hits)


@pytest.mark.parametrize(
    ("by_task", "p"),
    [
        ([[0.1, 0.2, 0.3, 0.1, 0.4]], 2 / 32),  # all of one sign
        ([[-0.1, -0.2, -0.3]], 2 / 8),
        ([[3.0, 2.0, -1.0]], 4 / 8),  # ++- is 4; +++ is 6; +-- is 0; +-+ is 2; and their mirror images
        ([[3.0, 2.0], [-1.0]], 6 / 8),  # 1.5 + 1 - 1; of its signs only 1.5 - 1 - 1 and the mirror image come nearer
        ([[0.3]], 1.0),
        ([[0.0, 0.0, 0.0]], 1.0),
        ([[1.0, -1.0]], 1.0),
        ([[0.0, 0.1, 0.2, 0.3]], 2 / 8),  # a tie has no sign
        ([[0.1, 0.2, 0.3, -0.1]], 6 / 16),  # 0.5 but for rounding are also 0.4 + 0.1 and its mirror image
    ],
)
def test_exact_permutation_by_hand(by_task: list[list[float]], p: float) -> None:
    assert sign_flip_p(by_task) == p
    assert slow_p(by_task) == p


def test_differences_of_rounding_are_ties() -> None:
    assert sign_flip_p([[1e-15, 2e-15, 1e-15]]) == 1.0


def test_exact_permutation_of_uneven_tasks_weighs_tasks_not_pairs() -> None:
    by_task = [[0.5, -0.2, 0.3, 0.1, 0.6], [-0.7, 0.2], [0.4, 0.4, -0.1]]
    assert sign_flip_p(by_task) == slow_p(by_task)
    assert sign_flip_p(by_task) != sign_flip_p([[d for values in by_task for d in values]])


def test_exact_permutation_agrees_with_scipy() -> None:
    from scipy.stats import permutation_test

    values = [0.4, -0.1, 0.35, 0.2, 0.05, -0.3, 0.6]
    expected = permutation_test((values,), sum, permutation_type="samples", n_resamples=2**7).pvalue
    assert sign_flip_p([values]) == pytest.approx(expected)


def test_many_pairs_are_drawn_at_random_and_never_give_zero() -> None:
    generator = random.Random(0)
    values = [generator.gauss(0.3, 1) for _ in range(20)]
    exact = sign_flip_p([values])  # of 20; with the twenty-first next to nothing, it is nearly the same
    drawn = sign_flip_p([[*values, 1e-9]])
    assert 0.01 < exact < 0.9
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=0.015)  # four standard deviations of 19,999 draws
    assert sign_flip_p([[*values, 1e-9]]) == drawn
    assert sign_flip_p([[*values, 1e-9]], seed=1) != drawn
    assert sign_flip_p([[1.0] * 40]) == 1 / 20_000
    assert one(differing(UP_6 * 4)).p_method == MONTE_CARLO
    assert one(differing(UP_6 * 3)).p_method == EXACT


def test_holm_by_hand() -> None:
    # 4 * 0.005 = 0.02; 3 * 0.01 = 0.03; 2 * 0.03 = 0.06; 0.04 is less than the one before, so 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_interval_of_one_task_is_students_t_of_the_differences() -> None:
    comparison = one(differing([0.01, 0.05, -0.02, 0.04]))
    expected = mean_interval([0.01, 0.05, -0.02, 0.04])
    assert (comparison.mean_difference, comparison.low, comparison.high) == pytest.approx(
        (expected.mean, expected.low, expected.high)
    )


def test_interval_of_two_tasks_is_welchs() -> None:
    from scipy.stats import ttest_ind

    first, second = [0.01, 0.05, -0.02, 0.04], [0.3, 0.1, 0.25]
    # The sum of two means is the difference to the mirrored second, for which scipy has Welch's interval.
    welch = ttest_ind(first, [-value for value in second], equal_var=False).confidence_interval(0.9)
    assert stratified_interval([first, second], 0.9) == pytest.approx((welch.low / 2, welch.high / 2))
    # A task without spread adds no error; tasks that are equally noisy add their degrees of freedom: t(.975, 4).
    steady = stratified_interval([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    assert steady == pytest.approx((3.5 - 4.302653 / math.sqrt(3) / 2, 3.5 + 4.302653 / math.sqrt(3) / 2))
    assert stratified_interval([[1.0, 2.0, 3.0]] * 2)[1] == pytest.approx(2 + 2.776445 * math.sqrt(2 / 3) / 2)


def test_bootstrap_interval_agrees_with_scipy() -> None:
    import numpy as np
    from scipy.stats import bootstrap

    def mean_of_means(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean([task.mean(axis=axis) for task in tasks], axis=0)

    tasks = [[0.01, 0.05, -0.02, 0.04], [0.3, 0.1, 0.25], [0.0, 0.01, -0.01]]
    slow = bootstrap(tasks, mean_of_means, n_resamples=9999, method="percentile", vectorized=True).confidence_interval
    assert bootstrap_interval(tasks) == pytest.approx((slow.low, slow.high), abs=0.004)
    assert bootstrap_interval(tasks) == bootstrap_interval(tasks)
    assert bootstrap_interval(tasks) != bootstrap_interval(tasks, seed=1)


def test_bootstrap_of_three_values_is_their_27_resamples() -> None:
    means = sorted(sum(drawn) / 3 for drawn in itertools.product([0.0, 1.0, 2.0], repeat=3))
    assert bootstrap_interval([[0.0, 1.0, 2.0]]) == pytest.approx((means[0], means[-1]))  # 1 of 27 is more than 2.5 %
    assert bootstrap_interval([[0.0, 1.0, 2.0]], 0.9) == pytest.approx((means[1], means[-2]))


def test_bootstrap_stands_beside_the_interval_and_is_absent_with_it() -> None:
    comparison = one(differing([0.01, 0.05, -0.02]))
    assert comparison.low is not None
    assert comparison.bootstrap_low is not None
    assert comparison.bootstrap_high is not None
    assert comparison.low < comparison.bootstrap_low < 0.0133 < comparison.bootstrap_high
    for without in (differing(UP_6[:2]), differing([0.0] * 4), [*differing(UP_6, "cola"), *differing(UP_6[:2], "rte")]):
        few = one(without)
        assert (few.low, few.bootstrap_low, few.bootstrap_high) == (None, None, None)


def test_choices_are_compared_at_the_same_budget_of_the_same_method() -> None:
    arms = ["lora", "lora-fish@0.1", "lora-fish@0.01", "lora-fish-rand@0.1", "lora-fish-rev@0.01", "dora-fish-rand@0.1"]
    assert choice_pairs(arms) == [
        ("lora-fish@0.1", "lora-fish-rand@0.1"),
        ("lora-fish@0.01", "lora-fish-rev@0.01"),
    ]
    variants = ["lora-fish-quota", "lora-fish", "lora-fish-norm", "lora-fish-rand"]
    assert choice_pairs(variants) == [(arm, "lora-fish-rand") for arm in variants[:3]]
    assert choice_pairs(["lora", "dora"]) == []


def test_by_task_p_is_corrected_over_all_tasks_and_pairs() -> None:
    runs = [run for task in ("a", "b", "c", "d") for run in differing([*UP_6, 0.07], task)]
    found = compare_by_task(runs)
    assert [task for task, _ in found] == ["a", "b", "c", "d"]
    for _, each in found:
        assert (each.p, each.p_corrected) == (2 / 2**7, 8 / 2**7)
        assert each.verdict == "too few seeds"  # seven pairs can reach 0.016, and four such only 0.063
        assert each.reason is not None
        assert "after correction for 4 comparisons" in each.reason
    only_there = [*runs, *scores("lora-fish-rand", [0.5] * 7, task="b")]
    pairs = [("lora-fish", "lora-fish-rand")]
    assert [(task, each.baseline) for task, each in compare_by_task(only_there, pairs)] == [("b", "lora-fish-rand")]


def test_steady_gain_is_better_and_steady_loss_is_worse() -> None:
    gain = one(differing(UP_6))
    loss = one(differing([-difference for difference in UP_6]))
    assert (gain.verdict, loss.verdict) == ("better", "worse")
    assert (gain.p, gain.p_corrected, gain.p_method, gain.reason) == (2 / 64, 2 / 64, EXACT, None)
    assert (gain.wins, gain.ties, gain.losses) == (6, 0, 0)
    assert (loss.wins, loss.ties, loss.losses) == (0, 0, 6)
    assert gain.mean_difference == pytest.approx(0.035)


def test_difference_that_is_lost_in_the_noise_is_no_win() -> None:
    comparison = one(differing([0.3, -0.2, 0.25, -0.1, 0.2, -0.15]))
    assert comparison.mean_difference is not None
    assert comparison.mean_difference > 0
    assert comparison.verdict == "no difference shown"
    assert comparison.reason is None


def test_confidence_decides_what_is_significant() -> None:
    (strict,) = compare(differing([*UP_6, 0.07]), confidence=0.99)  # the smallest p of seven pairs is 0.016
    (loose,) = compare(differing(UP_6[:5]), confidence=0.9)  # that of five is 0.0625
    assert (strict.verdict, loose.verdict) == ("too few seeds", "better")


def test_correction_takes_a_win_back() -> None:
    noise = [0.03, -0.02, 0.04, -0.05, 0.01, -0.02, 0.02, -0.03]
    gain = [0.05, 0.05, 0.06, 0.04, 0.05, 0.04, 0.05, -0.02]  # p = 4 / 256: 0.016, three times that is 0.047
    alone = compare(differing(gain))[0]
    others = [run for n in range(3) for run in differing(noise, arm=f"lora-fish@0.{n}") if run.arm != "lora"]
    of_three = compare([*differing(gain), *others[:16]])[0]
    of_four = compare([*differing(gain), *others])[0]
    assert alone.p == of_three.p == of_four.p == 4 / 256
    assert (alone.verdict, of_three.verdict, of_four.verdict) == ("better", "better", "no difference shown")
    assert [of_three.p_corrected, of_four.p_corrected] == [12 / 256, 16 / 256]


def test_three_pairs_can_never_be_significant_and_the_reason_says_so() -> None:
    comparison = one(differing([0.10, 0.11, 0.12]))
    assert comparison.low is not None
    assert comparison.low > 0  # Student's t is sure of it, but its normal distribution is an assumption
    assert (comparison.p, comparison.verdict) == (0.25, "too few seeds")
    assert comparison.reason == "3 pairs cannot be significant: the smallest p is 0.25."
    with_tie = one(differing([0.10, 0.11, 0.12, 0.0]))
    assert with_tie.reason == "3 untied pairs cannot be significant: the smallest p is 0.25."


def test_significance_that_only_the_correction_rules_out() -> None:
    others = [run for n in range(3) for run in differing(UP_6, arm=f"lora-fish@0.{n}") if run.arm != "lora"]
    for comparison in compare([*differing(UP_6), *others]):
        assert comparison.verdict == "too few seeds"
        assert comparison.reason == (
            "6 pairs cannot be significant: the smallest p is 0.0312, 0.125 after correction for 4 comparisons."
        )


@pytest.mark.parametrize(("n", "seeds", "pairs", "p"), [(1, "1 seed", "1 pair", "1"), (2, "2 seeds", "2 pairs", "0.5")])
def test_fewer_than_three_seeds_give_no_interval(n: int, seeds: str, pairs: str, p: str) -> None:
    comparison = one(differing(UP_6[:n]))
    assert (comparison.low, comparison.high, comparison.n, comparison.n_seeds) == (None, None, n, n)
    assert comparison.verdict == "too few seeds"
    assert comparison.reason == (
        f"{seeds}; at least 3 are needed. {pairs} cannot be significant: the smallest p is {p}."
    )


def test_two_seeds_on_one_of_many_tasks_are_too_few() -> None:
    runs = [*differing(UP_6, "cola"), *differing(UP_6[:2], "rte")]
    comparison = one(runs)
    assert (comparison.n, comparison.n_seeds, comparison.low) == (8, 2, None)
    assert comparison.p == 2 / 256
    assert comparison.verdict == "too few seeds"
    assert comparison.reason == "2 seeds in the task that has the fewest; at least 3 are needed."


def test_only_runs_that_finished_in_both_arms_are_paired() -> None:
    runs = [ok("lora", 1, 0.5), failed("lora", 2), ok("lora", 3, 0.5), ok("lora", 4, math.nan), ok("lora", 5, 0.5)]
    runs += [ok("lora-fish", 1, 0.6), ok("lora-fish", 2, 0.9), ok("lora-fish", 3, 0.4), ok("lora-fish", 4, 0.9)]
    runs += [ok("lora-fish", 5, math.inf), ok("lora-fish", 6, 0.9), replace(ok("lora-fish", 7, 0.9), value=None)]
    stopped = replace(ok("lora-fish", 8, 0.9), status="failed")  # after its first evaluation
    runs += [ok("lora", 7, 0.5), ok("lora", 8, 0.5), stopped]
    comparison = one(runs)
    assert (comparison.n, comparison.wins, comparison.losses) == (2, 1, 1)
    assert comparison.mean_difference == pytest.approx(0.0)


def test_arm_without_any_pair() -> None:
    for runs in ([ok("lora-fish", 1, 0.5)], [ok("lora", 1, 0.5), failed("lora-fish", 1)]):
        comparison = one(runs)
        assert (comparison.n, comparison.n_seeds, comparison.mean_difference) == (0, 0, None)
        assert (comparison.p, comparison.p_corrected, comparison.p_method) == (None, None, None)
        assert comparison.verdict == "no pairs"
        assert comparison.reason == "No seed finished in both lora-fish and lora."
    both = compare([*differing(UP_6), failed("lora-fish@0.1", 1)])
    assert [comparison.p_corrected for comparison in both] == [2 / 64, None]  # what was not tested corrects nothing
    assert compare([]) == compare(scores("lora", [0.5])) == []


def test_equal_pairs_and_steady_differences_have_no_interval() -> None:
    # 0.1 + 0.2 is not 0.3 in binary: a tie all the same.
    runs = [*scores("lora", [0.3, 0.5, 0.6]), *scores("lora-fish", [0.1 + 0.2, 0.5, 0.6])]
    equal = one(runs)
    assert (equal.verdict, equal.p, equal.ties, equal.low) == ("all pairs equal", 1.0, 3, None)
    assert equal.reason == "Every seed gave the same difference, which says nothing about their spread."
    steady = one([*scores("lora", [0.1] * 6), *scores("lora-fish", [0.1 + 0.2] * 6)])
    assert (steady.low, steady.verdict, steady.reason) == (None, "better", equal.reason)


def test_tasks_weigh_the_same_whatever_their_seeds() -> None:
    runs = [*differing([0.1] * 2 + [0.4], "cola"), *differing([-0.3, -0.2, -0.1, -0.2, -0.2, -0.2], "rte")]
    comparison = one(runs)
    assert comparison.tasks == ("cola", "rte")
    assert comparison.mean_difference == pytest.approx((0.2 - 0.2) / 2)  # over the pairs it would be -0.067
    assert (comparison.n, comparison.n_seeds, comparison.wins, comparison.losses) == (9, 3, 3, 6)
    assert comparison.p == slow_p([[0.1, 0.1, 0.4], [-0.3, -0.2, -0.1, -0.2, -0.2, -0.2]])


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


def test_many_tasks_show_what_one_cannot() -> None:
    tasks = [differing([0.01, 0.02, 0.03], task) for task in ("cola", "mrpc", "rte", "stsb")]
    assert one(tasks[0]).verdict == "too few seeds"
    together = one(list(itertools.chain(*tasks)))
    assert (together.verdict, together.p, together.n, together.n_seeds) == ("better", 2 / 2**12, 12, 3)


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
    assert (swapped.p, swapped.wins, swapped.losses) == (base.p, base.losses, base.wins)
    assert (swapped.mean_difference, swapped.low, swapped.high) == pytest.approx(
        (-base.mean_difference, -base.high, -base.low)
    )
    scaled = one([replace(run, value=100 * run.value + 3) for run in runs if run.value is not None])
    assert (scaled.p, scaled.verdict, scaled.wins) == (base.p, base.verdict, base.wins)
    assert (scaled.low, scaled.high) == pytest.approx((100 * base.low, 100 * base.high))

    (narrower,) = compare(runs, confidence=0.5)
    assert narrower.low is not None
    assert narrower.low > base.low


def test_seed_decides_the_bootstrap_and_the_monte_carlo_p_alone() -> None:
    generator = random.Random(0)
    runs = differing([generator.gauss(0.1, 0.5) for _ in range(25)])
    assert compare(runs) == compare(runs, seed=0) == compare(runs[::-1])
    first, second = compare(runs)[0], compare(runs, seed=1)[0]
    assert first.p != second.p
    assert first.bootstrap_low != second.bootstrap_low
    assert (first.low, first.wins) == (second.low, second.wins)


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
    assert [label(run) for run in runs[::3]] == arms


def test_what_cannot_be_compared_is_refused() -> None:
    runs = differing(UP_6)
    with pytest.raises(ConfigurationError, match=r"no run of 'lora-fsh'.*Did you mean 'lora-fish'"):
        compare(runs, [("lora-fsh", "lora")])
    with pytest.raises(ConfigurationError, match=r"between 0 and 1.*it is 95"):
        compare(runs, confidence=95)
    with pytest.raises(ConfigurationError, match=r"lora-fish, task '', seed 1 finished twice.*0\.51.*0\.9"):
        compare([*runs, ok("lora-fish", 1, 0.9)])
    with pytest.raises(ConfigurationError, match="the same metric and the same model"):
        compare([replace(run, model="bert") if run.arm == "lora" else run for run in runs])
    assert compare([*runs, failed("lora-fish", 1)]) == compare(runs)  # a first attempt that failed is no contradiction
