"""What the page says in words: the question, the answers, and the texts of cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from fish_tuning.experiments.compare import numbers, references
from fish_tuning.experiments.compare.comparisons import SIGNIFICANT, Comparison
from fish_tuning.experiments.config.arm_names import CONTROLS, HEAD_ALONE, ArmName
from fish_tuning.experiments.report.page.differences import signed, spoken_difference
from fish_tuning.experiments.report.page.results import Results, Score
from fish_tuning.experiments.report.tables import human_bytes

UNLEARNED = references.UNLEARNED
BETTER_MARK, WORSE_MARK = "\N{BLACK UP-POINTING TRIANGLE}", "\N{BLACK DOWN-POINTING TRIANGLE}"
_MOST_NAMES = 6
_MOST_ROWS = 12
_CONTROLS = dict(zip(CONTROLS, ("at random", "in reverse"), strict=True))


def question(results: Results) -> str:
    """What was compared on what, in a sentence."""
    methods = list(dict.fromkeys(ArmName.parse(arm).method for arm in results.arms if arm != HEAD_ALONE))
    masked = [arm for arm in results.arms if ArmName.parse(arm).suffix]
    models = list(dict.fromkeys(PurePath(run.model).name for run in results.runs if run.model))
    where = f"on {listed(results.tasks)}" + (f" with {listed(models)}" if models else "")
    if len(results.arms) == 1:
        return f"How well does {results.arms[0]} do? It ran {where}, {_seeds(results)}."
    asked = "Does an adapter do as well when only chosen entries of it are trained?" if masked else "Which does better?"
    if results.of_choice.overall:
        asked = f"{asked[:-1]}, and does it matter how they are chosen?"
    return f"{asked} {len(results.arms)} arms of {listed(methods)} compared {where}, {_seeds(results)}."


def answers(results: Results) -> list[tuple[str, str]]:
    """One or two plain sentences for each dense arm that others are compared with, then for each way of choosing."""
    dense, choice = results.to_dense.overall, results.of_choice.overall
    if not dense and not choice:
        return [("", f"Only {listed(results.arms)} ran, so there is nothing to compare with.")]
    found = {f"Against {base}.": [each for each in dense if each.baseline == base] for base in _baselines(dense)}
    for suffix, how in _CONTROLS.items():
        against = [each for each in choice if ArmName.parse(each.baseline).suffix == suffix]
        found |= {f"Against as many entries chosen {how}.": against} if against else {}
    scored = [each for each in choice if ArmName.parse(each.baseline).suffix not in _CONTROLS]
    found |= {f"Against {base}.": [each for each in scored if each.baseline == base] for base in _baselines(scored)}
    return [(heading, _answer(comparisons)) for heading, comparisons in found.items()]


def row_name(comparison: Comparison) -> str:
    """What a row of differences is called: its arm, and what it is compared with unless that is its dense arm."""
    suffix = ArmName.parse(comparison.baseline).suffix
    how = _CONTROLS.get(suffix, suffix)
    return f"{comparison.arm} \N{MINUS SIGN} {how.split()[-1]}" if how else comparison.arm


def _baselines(comparisons: Sequence[Comparison]) -> list[str]:
    return list(dict.fromkeys(each.baseline for each in comparisons))


def _answer(comparisons: Sequence[Comparison]) -> str:
    by_verdict = {verdict: [each for each in comparisons if each.verdict == verdict] for verdict in _SENTENCES}
    parts = [
        sentence.format(_with_means(members, intervals=verdict in ("better", "worse")))
        for verdict, sentence in _SENTENCES.items()
        if (members := by_verdict[verdict])
    ]
    why = {each.reason for each in by_verdict["too few seeds"]}
    if len(why) > 1:
        return " ".join([*parts, "Why, stands below the table of differences."])
    return " ".join([*parts, *(reason for reason in why if reason)])


_SENTENCES: dict[str, str] = {
    "better": "Significantly better: {}.",
    "worse": "Significantly worse: {}.",
    "no difference shown": "No difference is shown for {}.",
    "too few seeds": "There are too few seeds to tell whether there is a difference for {}.",
    "all pairs equal": "Every pair is equal for {}.",
    "no spread": "Every seed gave the same difference, which tells nothing of its spread, for {}.",
    "settings differ": "No verdict is given for {}: runs of the same task differ in more than their seeds and arms.",
    "no pairs": "No seed finished in both for {}.",
}


def verdict_rows(results: Results) -> tuple[list[Comparison], str]:
    """The rows of the answer, significant ones first, and what is said of those that are left out."""
    every = [*results.to_dense.overall, *results.of_choice.overall]
    rows = sorted(every, key=lambda each: each.verdict not in SIGNIFICANT)
    if len(rows) <= _MOST_ROWS:
        return every, ""
    shown = [each for each in rows if each.verdict in SIGNIFICANT][:_MOST_ROWS]
    left = len(rows) - len(shown)
    of_those = "" if any(each.verdict in SIGNIFICANT for each in rows[len(shown) :]) else ", none of them significant"
    return shown, f"{count(left, 'more comparison')}{of_those}: in the tables of differences below."


def against(each: Comparison) -> str:
    """What a comparison is with: its dense arm, or as many entries chosen otherwise."""
    how = _CONTROLS.get(ArmName.parse(each.baseline).suffix)
    return f"as many entries chosen {how}" if how else each.baseline


def reasons(comparisons: Sequence[Comparison]) -> list[tuple[str, str]]:
    """Each reason once, with the rows it holds for; none where it holds for all."""
    found: dict[str, list[str]] = {}
    for each in comparisons:
        if each.reason:
            found.setdefault(each.reason, []).append(row_name(each))
    return [(why, "" if len(arms) == len(comparisons) else listed(arms)) for why, arms in found.items()]


def _with_means(comparisons: Sequence[Comparison], intervals: bool = False) -> str:
    means = [each.mean_difference for each in comparisons if each.mean_difference is not None]
    if len(comparisons) > _MOST_NAMES:
        return f"{len(comparisons)} arms" + (f" ({signed(min(means))} to {signed(max(means))})" if means else "")
    return listed([_with_mean(each, intervals) for each in comparisons])


def _with_mean(each: Comparison, interval: bool) -> str:
    if each.mean_difference is None:
        return each.arm
    return f"{each.arm} ({spoken_difference(each) if interval else signed(each.mean_difference)})"


def mark_of(results: Results, arm: str, task: str | None) -> str:
    """A triangle where the difference to the dense arm is significant; `task` is None for the average."""
    comparison = results.comparison(arm, task)
    if task is None and comparison is not None and comparison.missing_tasks:
        return ""
    return {"better": BETTER_MARK, "worse": WORSE_MARK}.get(comparison.verdict, "") if comparison else ""


def mean_text(score: Score) -> str:
    return "\N{EN DASH}" if score.mean is None else number(score.mean)


def interval_text(score: Score) -> str:
    """`[0.801, 0.823]`, or nothing."""
    return "" if score.low is None or score.high is None else f"[{number(score.low)}, {number(score.high)}]"


def remarks(score: Score, average: bool = False) -> list[str]:
    """Why there is no interval, what failed and what has not run."""
    if average:
        return [score.reason] if score.reason else [] if score.mean is not None else ["not all tasks"]
    runs = len(score.values) + score.n_failed + score.n_missing
    if score.n_missing == runs:
        return ["not run"] if runs else []
    found = []
    if score.values and score.reason:
        found.append(score.reason)
    if score.n_failed:
        found.append(f"{score.n_failed} of {runs} failed")
    if score.n_missing:
        found.append(f"{score.n_missing} of {runs} not run")
    return found


def parameters_text(span: tuple[int, int] | None) -> str:
    if span is None:
        return "\N{EN DASH}"
    return f"{span[0]:,}" if span[0] == span[1] else f"{span[0]:,}\N{EN DASH}{span[1]:,}"


def parts_text(results: Results, arm: str) -> str:
    """`3,072 kept + 325 head`, or nothing where older records do not tell them apart."""
    kept, head = (results.span(arm, name) for name in ("kept_parameters", "head_parameters"))
    return "" if kept is None or head is None else f"{parameters_text(kept)} kept + {parameters_text(head)} head"


def number(value: float) -> str:
    return numbers.typeset(numbers.number(value) if abs(value) < 100 else f"{value:,.1f}")


def p_text(p: float | None) -> str:
    if p is None:
        return "\N{EN DASH}"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def seconds_text(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:,.1f}"


def bytes_text(value: int | None) -> str:
    return human_bytes(value).replace("-", "\N{EN DASH}")


def count(many: int, noun: str) -> str:
    return f"{many} {noun}" + ("" if many == 1 else "s")


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _seeds(results: Results) -> str:
    by_task: dict[str, set[int]] = {}
    for run in results.runs:
        by_task.setdefault(run.task, set()).add(run.seed)
    fewest, seeds = min(map(len, by_task.values()), default=0), sorted(set().union(*by_task.values()))
    if fewest < len(seeds):
        return f"with {fewest} to {len(seeds)} seeds a task"
    if len(seeds) == 1:
        return f"with seed {seeds[0]} alone"
    row = list(range(seeds[0], seeds[-1] + 1)) == list(seeds) if seeds else False
    told = f"{seeds[0]} to {seeds[-1]}" if row and len(seeds) > 2 else listed([str(seed) for seed in seeds])
    return f"with {len(seeds)} seeds ({told})"
