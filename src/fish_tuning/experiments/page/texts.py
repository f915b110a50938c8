"""The report as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from fish_tuning.experiments.comparisons import Comparison
from fish_tuning.experiments.page import words
from fish_tuning.experiments.page.costs import costs
from fish_tuning.experiments.page.forest import spoken_difference
from fish_tuning.experiments.page.results import Results, Score
from fish_tuning.experiments.tables import markdown_table

AVERAGE = "average"
_CSV = (
    *("arm", "task", "metric", "trainable_parameters", "mean", "low", "high", "n_ok", "n_failed", "n_missing"),
    *("baseline", "n_pairs", "difference", "difference_low", "difference_high", "p", "p_corrected"),
    *("wins", "ties", "losses", "verdict"),
)
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "\N{EN DASH}": "--",
        "\N{MINUS SIGN}": r"\ensuremath{-}",
        "\n": " ",
        **{character: f"\\{character}" for character in "&%$#_{}"},
    }
)


def markdown_text(results: Results, notes: Sequence[str]) -> str:
    """The question, the answers, and the tables of scores, differences and costs."""
    columns = _columns(results)
    scores = [
        [_line(arm), words.parameters_text(results.parameters(arm)), *(_cell(results, arm, each) for each in columns)]
        for arm in results.arms
    ]
    parts = [
        "# Report",
        _plain(words.question(results)),
        *(_plain(f"Against {base}. {text}" if base else text) for base, text in words.answers(results)),
        "## Scores",
        markdown_table(["arm", "trainable parameters", *(_line(_header(results, each)) for each in columns)], scores),
        f"{words.BETTER_MARK} significantly better, {words.WORSE_MARK} significantly worse than the dense arm of the "
        "same method (paired sign-flip test, p at most 0.05 after Holm's correction); no mark: no difference is shown. "
        "Fewer than three seeds give no interval.",
    ]
    if results.comparisons:
        parts += ["## Differences to the dense arm", markdown_table(*_differences(results.comparisons))]
    measured = [
        [
            *(_line(cost.arm), words.seconds_text(cost.scoring), words.seconds_text(cost.training)),
            *map(words.bytes_text, (cost.peak_memory, cost.optimizer, cost.adapter)),
        ]
        for cost in costs(results)
    ]
    if measured:
        headers = ["arm", "scoring s", "training s", "peak memory", "optimizer state", "adapter"]
        parts += ["## Cost", markdown_table(headers, measured)]
    told = [f"{run.arm}, seed {run.seed}, {run.task}: {run.error}" for run in results.failed]
    told += [f"{arm}, seed {seed}, {task}: not run" for task, arm, seed in results.missing]
    if told or notes:
        lines = ("- " + _plain(line).replace("\n", "\n  ") for line in (*told, *notes))
        parts += ["## Failed, missing and left out", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def latex_text(results: Results) -> str:
    """A table for booktabs: `0.818 ± 0.007`, half the 95 % interval."""
    columns = _columns(results)
    rows = [
        " & ".join(
            [latex_escape(arm), latex_escape(words.parameters_text(results.parameters(arm)))]
            + [_latex_cell(results, arm, column) for column in columns]
        )
        + r" \\"
        for arm in results.arms
    ]
    headers = " & ".join(latex_escape(header) for header in ("arm", "parameters", *columns))
    caption = (
        "Mean over seeds and half its 95 % interval, where three seeds finished. Difference to the dense arm of the "
        "same method significantly above (*) or below (+) zero: paired sign-flip test, p at most 0.05 after Holm's "
        "correction."
    )
    caption = latex_escape(caption).replace("(*)", r"($^{*}$)").replace("(+)", r"($^{\dagger}$)")
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        r"  \caption{" + caption + "}",
        r"  \begin{tabular}{l" + "r" * (len(columns) + 1) + "}",
        r"    \toprule",
        f"    {headers} \\\\",
        r"    \midrule",
        *(f"    {row}" for row in rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def latex_escape(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return text.translate(_LATEX)


def csv_text(results: Results) -> str:
    """A line for each arm and task, and for each arm's average."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _CSV, lineterminator="\n")
    writer.writeheader()
    for arm in results.arms:
        for column in _columns(results):
            writer.writerow(_csv_row(results, arm, column))
    return text.getvalue()


def _columns(results: Results) -> list[str]:
    return [*results.tasks, *([AVERAGE] if results.averages else [])]


def _score(results: Results, arm: str, column: str) -> Score:
    return results.scores[arm, column] if (arm, column) in results.scores else results.averages[arm]


def _mark(results: Results, arm: str, column: str) -> str:
    return words.mark_of(results, arm, column if column in results.tasks else None)


def _header(results: Results, column: str) -> str:
    return f"{column} ({results.metrics[column]})" if column in results.metrics else column


def _cell(results: Results, arm: str, column: str) -> str:
    score = _score(results, arm, column)
    told = words.remarks(score, average=column not in results.tasks)
    parts = [words.mean_text(score), _mark(results, arm, column), words.interval_text(score)]
    return " ".join([part for part in parts if part] + ([f"({', '.join(told)})"] if told else []))


def _latex_cell(results: Results, arm: str, column: str) -> str:
    score = _score(results, arm, column)
    if score.mean is None:
        return "--"
    half = "" if score.high is None else rf" \pm {score.high - score.mean:.3f}"
    sign = {words.BETTER_MARK: "^{*}", words.WORSE_MARK: r"^{\dagger}"}.get(_mark(results, arm, column), "")
    failed = f" ({score.n_failed} failed)" if score.n_failed else ""
    return f"${score.mean:.3f}{half}{sign}${failed}"


def _differences(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    headers = ["arm", "baseline", "difference", "pairs", "wins / ties / losses", "p corrected", "verdict", "remark"]
    rows = [
        [
            *(_line(each.arm), _line(each.baseline), spoken_difference(each), str(each.n)),
            *(f"{each.wins} / {each.ties} / {each.losses}", words.p_text(each.p_corrected), each.verdict),
            _line(each.reason or ""),
        ]
        for each in comparisons
    ]
    return headers, rows


def _csv_row(results: Results, arm: str, column: str) -> dict[str, object]:
    score, size = _score(results, arm, column), results.parameters(arm)
    one = column not in results.tasks or len(results.tasks) == 1
    each = results.comparison(arm) if one else results.by_task.get((arm, column))
    row: dict[str, object] = {
        **{"arm": arm, "task": column, "metric": results.metrics.get(column, ""), "mean": score.mean},
        **{"low": score.low, "high": score.high, "n_failed": score.n_failed, "n_missing": score.n_missing},
        "n_ok": len(score.values) if column in results.tasks else "",
        "trainable_parameters": size[1] if size else None,
    }
    if each is not None:
        row |= {"baseline": each.baseline, "n_pairs": each.n, "difference": each.mean_difference}
        row |= {"difference_low": each.low, "difference_high": each.high, "p": each.p, "p_corrected": each.p_corrected}
        row |= {"wins": each.wins, "ties": each.ties, "losses": each.losses, "verdict": each.verdict}
    return row


def _plain(text: str) -> str:
    """Text in Markdown, where `<` and `_` would mean something."""
    for character in "\\`*_<>[]":
        text = text.replace(character, f"\\{character}")
    return text


def _line(text: str) -> str:
    """The same, for a cell."""
    return _plain(" ".join(text.split()))
