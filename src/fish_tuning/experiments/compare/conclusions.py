"""What a finished experiment says: its differences, and at most one sentence on those of its main arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fish_tuning.experiments.compare.comparisons import SIGNIFICANT, Comparison, choice_pairs, compare
from fish_tuning.experiments.compare.summaries import summarize
from fish_tuning.experiments.config.arm_names import CONTROLS, HEAD_ALONE, ArmName, baseline_of
from fish_tuning.experiments.records.run_record import RunRecord


def differences(runs: Sequence[RunRecord]) -> list[Comparison]:
    """Each arm minus its dense arm, then each that scores choose minus its controls.

    Each of the two is corrected by itself, as in the report: a difference is called one only where its interval,
    corrected for all of its kind, leaves out zero.
    """
    # One experiment has one task and model, whatever records of other versions say of it.
    finished = [replace(run, task="", model="") for run in runs if run.status == "ok"]
    return [*compare(finished), *compare(finished, choice_pairs(run.arm for run in finished))]


def conclusion(runs: Sequence[RunRecord]) -> str:
    """One sentence on the arms that scores choose (where there is none, on all): what they are ahead of, and what not.

    It says what the verdicts of `differences` say, and nothing of means.
    """
    summary = summarize(runs)
    if not summary:
        return "No arm has run, so there is nothing to compare."
    if all(arm.arm == HEAD_ALONE for arm in summary):
        return "Only the head alone has run, so there is nothing to compare."
    compared = [each for each in differences(runs) if each.n]
    if not compared:
        return _why_nothing(runs)
    chosen = [each for each in compared if ArmName.parse(each.arm).suffix not in ("", *CONTROLS)] or compared
    arms = list(dict.fromkeys(each.arm for each in chosen))
    return _of_arm(arms[0], chosen) if len(arms) == 1 else _of_arms(chosen)


def _why_nothing(runs: Sequence[RunRecord]) -> str:
    reasons = [each.reason for each in differences(runs) if each.reason]
    if reasons:
        return reasons[0]
    arms = {run.arm for run in runs}
    if any(ArmName.parse(arm).count is not None for arm in arms):
        return "No dense arm of that size and no other choice has run beside it, so there is nothing to compare."
    methods = ", ".join(dict.fromkeys(baseline_of(run.arm) for run in runs if run.arm != HEAD_ALONE))
    return f"There is no finished pair of {methods} and another arm, so there is nothing to compare."


def _of_arm(arm: str, compared: Sequence[Comparison]) -> str:
    """`On this data set lora-fish is significantly ahead of lora, and not told apart from lora-fish-rand.`"""
    groups = {
        "significantly ahead of": [each.baseline for each in compared if each.verdict == "better"],
        "significantly behind": [each.baseline for each in compared if each.verdict == "worse"],
        "equal, in every pair, to": [each.baseline for each in compared if each.verdict == "all pairs equal"],
    }
    open_ones = [each for each in compared if each.verdict not in (*SIGNIFICANT, "all pairs equal")]
    reasons = {each.reason for each in open_ones}
    groups["not told apart from"] = [each.baseline for each in open_ones]
    parts = [f"{how} {_and(arms)}" for how, arms in groups.items() if arms]
    why = (reasons.pop() or "").rstrip(".") if len(reasons) == 1 else ""  # of all of them alike
    return f"On this data set {arm} is {_and(parts, ', and ')}{f' ({why})' if why else ''}."


def _of_arms(compared: Sequence[Comparison]) -> str:
    ahead, behind = (sum(each.verdict == verdict for each in compared) for verdict in SIGNIFICANT)
    return (
        f"On this data set, of the {len(compared)} differences of arms that scores choose, {ahead} are significantly "
        f"above zero, {behind} below, and {len(compared) - ahead - behind} are not told apart from it."
    )


def _and(parts: Sequence[str], last: str = " and ") -> str:
    return last.join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
