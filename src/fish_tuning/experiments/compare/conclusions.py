"""What a finished experiment says, in a few sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fish_tuning.experiments.compare.comparisons import SIGNIFICANT, Comparison, choice_pairs, compare
from fish_tuning.experiments.compare.numbers import number, signed
from fish_tuning.experiments.compare.summaries import ArmSummary, summarize
from fish_tuning.experiments.config.arm_names import CONTROLS, HEAD_ALONE, ArmName, baseline_of
from fish_tuning.experiments.records.run_record import RunRecord

_CHOSEN = dict(zip(CONTROLS, ("at random", "in reverse"), strict=True))


def conclusion(runs: Sequence[RunRecord]) -> str:
    """For each method: its FISH arm against its dense arm and against other choices, then its other arms' means.

    A difference is called one only where its interval, corrected for all arms, leaves out zero (those of other choices
    are corrected apart, as in the report).
    """
    summary = summarize(runs)
    if not summary:
        return "No arm has run, so there is nothing to compare."
    # One experiment has one task and model, whatever records of other versions say of it.
    finished = [replace(run, task="", model="") for run in runs if run.status == "ok"]
    compared = [*compare(finished), *compare(finished, choice_pairs(run.arm for run in finished))]
    counted = [arm for arm in summary if ArmName.parse(arm.arm).count is not None]
    if counted:
        return " ".join(_of_count(arm, summary, compared) for arm in _main_arms(counted))
    methods = dict.fromkeys(baseline_of(arm.arm) for arm in summary if arm.arm != HEAD_ALONE)
    if not methods:
        return "Only the head alone has run, so there is nothing to compare."
    return " ".join(
        _of_method([arm for arm in summary if baseline_of(arm.arm) == method], method, compared) for method in methods
    )


def _main_arms(counted: Sequence[ArmSummary]) -> list[ArmSummary]:
    """Those that scores choose; where none does, all."""
    finished = [arm for arm in counted if arm.mean is not None]
    return [arm for arm in finished if ArmName.parse(arm.arm).suffix not in CONTROLS] or finished


def _of_count(arm: ArmSummary, summary: Sequence[ArmSummary], compared: Sequence[Comparison]) -> str:
    """An arm of a given number of entries: against every dense arm of that size, then against other choices."""
    means = {each.arm: each.mean for each in summary}
    sentences = [f"{arm.arm} reaches {arm.metric} {number(arm.mean or 0.0)}."]
    for each in compared:
        if each.arm != arm.arm or each.mean_difference is None:
            continue
        how = _CHOSEN.get(ArmName.parse(each.baseline).suffix)
        mean = number(means.get(each.baseline) or 0.0)
        other = f"as many entries chosen {how} ({mean})" if how else f"{each.baseline} ({mean})"
        sentences.append(_verdict(f"The mean difference to {other}", each))
    if len(sentences) == 1:
        sentences.append("No dense arm of that size and no other choice has run beside it.")
    return " ".join(sentences)


def _of_method(summary: Sequence[ArmSummary], baseline: str, compared: Sequence[Comparison]) -> str:
    reference = next((arm for arm in summary if arm.arm == baseline), None)
    finished = [arm for arm in summary if arm.arm != baseline and arm.mean is not None]
    if reference is None or reference.mean is None or not finished:
        return f"There is no finished pair of {baseline} and another arm, so there is nothing to compare."
    main = next((arm for arm in finished if arm.arm == f"{baseline}-fish"), finished[0])
    others = [f"{arm.arm} {number(arm.mean or 0.0)}" for arm in finished if arm is not main]
    mine = {each.baseline: each for each in compared if each.arm == main.arm}
    sentences = [_reached(main, reference), _verdict("The mean difference", mine.get(baseline))]
    for name, each in mine.items():
        if name != baseline and each.n:
            chosen = _CHOSEN[ArmName.parse(name).suffix]
            sentences.append(_verdict(f"The mean difference to as many entries chosen {chosen}", each))
    if others:
        sentences.append(f"The other arms: {', '.join(others)}.")
    return " ".join(sentences)


def _reached(arm: ArmSummary, reference: ArmSummary) -> str:
    ours, theirs = arm.trainable_parameters, reference.trainable_parameters
    reached = f"{arm.arm} reaches {arm.metric} {number(arm.mean or 0.0)}"
    if not ours or not theirs or ours == theirs:
        size = f", each with {ours:,} trainable parameters" if ours else ""
        return f"{reached} and {reference.arm} {number(reference.mean or 0.0)}{size}."
    size = f"with {_share(ours / theirs)} the trainable parameters of {reference.arm} ({ours:,} against {theirs:,})"
    return f"{reached} {size}, which reaches {number(reference.mean or 0.0)}."


def _share(ratio: float) -> str:
    if abs(ratio - 0.5) < 0.005:
        return "half"
    if abs(ratio - 0.25) < 0.0025:
        return "a quarter of"
    return f"{ratio:.0%} of" if ratio < 1 else f"{ratio:.2f} times"


def _verdict(subject: str, each: Comparison | None) -> str:
    if each is None or each.mean_difference is None:
        return f"{each.reason}" if each and each.reason else "They have no finished seed in common."
    text = f"{subject} over {each.n} paired {'seed' if each.n == 1 else 'seeds'} is {signed(each.mean_difference)}"
    if each.verdict == "all pairs equal":
        return f"{text}: every pair is equal."
    if each.low is None or each.high is None:
        return f"{text}, and this run does not tell them apart: {each.reason}"
    text += f", 95 % interval corrected for all comparisons [{signed(each.low)}, {signed(each.high)}]"
    if each.verdict in SIGNIFICANT:
        side = "above" if each.verdict == "better" else "below"
        return f"{text}: significantly {side} zero on this data set."
    return f"{text}: it holds zero, so this run does not tell them apart."
