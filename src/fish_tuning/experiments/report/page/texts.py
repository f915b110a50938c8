"""The report as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from fish_tuning.experiments.compare import numbers
from fish_tuning.experiments.compare.comparisons import Comparison
from fish_tuning.experiments.report.page import words
from fish_tuning.experiments.report.page.costs import costs
from fish_tuning.experiments.report.page.differences import spoken_bounds, spoken_difference
from fish_tuning.experiments.report.page.results import Family, Results, Score
from fish_tuning.experiments.report.tables import harmless, markdown_table

AVERAGE = "average"
_PARTS = ("kept_parameters", "head_parameters")
_CSV = (
    *("arm", "task", "metric", "trainable_parameters", *_PARTS, "mean", "low", "high", "n_ok", "n_failed", "n_missing"),
    *("family", "baseline", "n_pairs", "difference", "difference_low", "difference_high"),
    *("raw_low", "raw_high", "p", "p_corrected", "wins", "ties", "losses", "verdict", "remark"),
)
_LATEX_FIT = r"  \ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi"
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
        [_line(arm), words.parameters_text(results.parameters(arm)), words.parts_text(results, arm)]
        + [_cell(results, arm, each) for each in columns]
        for arm in results.arms
    ]
    if results.constants:
        constants = (results.constants.get(column) for column in columns)
        told = ["\N{EN DASH}" if value is None else words.number(value) for value in constants]
        scores.insert(0, [results.constant_name, "", "", *told])
    parts = [
        "# Report",
        _plain(words.question(results)),
        *(f"**{_plain(head)}** {_plain(text)}" if head else _plain(text) for head, text in words.answers(results)),
        "## Scores",
        markdown_table(
            ["arm", "trainable parameters", "of these", *(_line(_header(results, each)) for each in columns)], scores
        ),
        f"{words.BETTER_MARK} significantly better, {words.WORSE_MARK} significantly worse than the dense arm of the "
        "same method (the difference's interval, corrected for all comparisons, leaves out zero); no mark: no "
        "difference is shown. "
        "Fewer than three seeds, or seeds that are all equal, give no interval.",
    ]
    parts += [_plain(note) for note in (*results.unlearned.values(), *results.fallen.values())]
    for heading, family in _families(results).items():
        parts += [f"## {heading}", markdown_table(*_differences(family.overall))]
    if results.to_dense.overall:
        parts += [
            "Intervals and p are corrected by Holm's method over the rows of each table by itself: an interval leaves "
            "out zero if and only if the difference is significant. Wins and losses count pairs, and are no verdict."
        ]
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


def _families(results: Results) -> dict[str, Family]:
    titles = ("Differences to the dense arm", "Chosen by scores, against other choices of the same budget")
    families = zip(titles, (results.to_dense, results.of_choice), strict=True)
    return {title: family for title, family in families if family.overall}


def latex_text(results: Results) -> str:
    """Tables for booktabs: the scores, as `0.818 ± 0.007` with half the 95 % interval, and the paired differences."""
    columns = _columns(results)
    rows = [_latex_constants(results, columns)] if results.constants else []
    rows += [
        " & ".join(
            [latex_escape(arm), latex_escape(words.parameters_text(results.parameters(arm)))]
            + [_latex_cell(results, arm, column) for column in columns]
        )
        + r" \\"
        for arm in results.arms
    ]
    headers = " & ".join(latex_escape(header) for header in ("arm", "parameters", *columns))
    caption = (
        "Mean over seeds and half its 95 % interval, where three seeds finished and differ. Difference to the dense "
        "arm of the same method significantly above (*) or below (+) zero: its interval, corrected for all "
        "comparisons, leaves out zero."
    )
    caption = _latex_marks(latex_escape(caption))
    tables = [_latex_table(caption, "l" + "r" * (len(columns) + 1), headers, rows)]
    tables += [_latex_differences(heading, family.overall) for heading, family in _families(results).items()]
    return "\n".join([r"% needs \usepackage{booktabs,graphicx}; a table that is too wide is made smaller", *tables])


def _latex_constants(results: Results, columns: Sequence[str]) -> str:
    values = (results.constants.get(column) for column in columns)
    cells = ["--" if value is None else f"${numbers.number(value)}$" for value in values]
    return " & ".join([latex_escape(results.constant_name), "0", *cells]) + r" \\"


def _latex_table(caption: str, columns: str, headers: str, rows: Sequence[str], remarks: Sequence[str] = ()) -> str:
    lines = [
        r"\begin{table}",
        r"  \centering",
        r"  \caption{" + caption + "}",
        r"  \smallskip",
        r"  \sbox0{\begin{tabular}{" + columns + "}",
        r"    \toprule",
        f"    {headers} \\\\",
        r"    \midrule",
        *(f"    {row}" for row in rows),
        r"    \bottomrule",
        r"  \end{tabular}}",
        _LATEX_FIT,
        *(rf"  \par\smallskip{{\footnotesize {latex_escape(remark)}\par}}" for remark in remarks),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_differences(heading: str, comparisons: Sequence[Comparison]) -> str:
    """Difference, corrected interval, wins/ties/losses and p for each."""
    headers = ("arm", "minus", "difference", "95 % interval", "w/t/l", "p", "corrected")
    rows = [
        " & ".join(
            [latex_escape(each.arm), latex_escape(each.baseline), _latex_difference(each)]
            + [latex_escape(spoken_bounds(each.low, each.high) or "--")]
            + [f"{each.wins}/{each.ties}/{each.losses}"]
            + [latex_escape(words.p_text(p)) for p in (each.p, each.p_corrected)]
        )
        + r" \\"
        for each in comparisons
    ]
    caption = latex_escape(
        f"{heading}: means of paired differences, their intervals (Student's t, corrected by Holm's method over these "
        "rows), wins, ties and losses, and p, as it is and corrected. Significantly above (*) or below (+) zero: the "
        "corrected interval leaves out zero."
    )
    told = [f"{arms}: {why}" if arms else why for why, arms in words.reasons(comparisons)]
    return _latex_table(_latex_marks(caption), "llrrrrr", " & ".join(map(latex_escape, headers)), rows, told)


def _latex_difference(each: Comparison) -> str:
    if each.mean_difference is None:
        return "--"
    sign = {"better": "^{*}", "worse": r"^{\dagger}"}.get(each.verdict, "")
    return f"${numbers.signed(each.mean_difference)}{sign}$"


def _latex_marks(caption: str) -> str:
    return caption.replace("(*)", r"($^{*}$)").replace("(+)", r"($^{\dagger}$)")


def latex_escape(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return text.translate(_LATEX)


def csv_text(results: Results) -> str:
    """A line for each arm and task and for each arm's average, then a line for each comparison of choices.

    The second kind has "choice" as its `family` and no scores, which stand in the first.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, _CSV, lineterminator="\n")
    writer.writeheader()
    columns = _columns(results)
    rows = [_csv_row(results, arm, column) for arm in results.arms for column in columns]
    rows += [
        {"arm": results.constant_name, "task": task, "metric": results.metrics.get(task, ""), "mean": value}
        for task, value in results.constants.items()
    ]
    for one in results.of_choice.overall:
        for column in columns:
            each = _on(results.of_choice, one, column) if column in results.tasks and len(results.tasks) > 1 else one
            if each is not None:
                row: dict[str, object] = {"arm": each.arm, "task": column, "metric": results.metrics.get(column, "")}
                rows.append(row | _csv_comparison("choice", each))
    writer.writerows({name: harmless(cell) for name, cell in row.items()} for row in rows)
    return text.getvalue()


def _on(family: Family, one: Comparison, task: str) -> Comparison | None:
    return family.by_task.get((one.arm, one.baseline, task))


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
    half = "" if score.high is None else rf" \pm {numbers.number(score.high - score.mean)}"
    sign = {words.BETTER_MARK: "^{*}", words.WORSE_MARK: r"^{\dagger}"}.get(_mark(results, arm, column), "")
    failed = f" ({score.n_failed} failed)" if score.n_failed else ""
    return f"${numbers.number(score.mean)}{half}{sign}${failed}"


def _differences(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    headers = ["arm", "baseline", "difference", "pairs", "wins / ties / losses", "p", "p corrected"]
    headers += ["verdict", "remark"]
    rows = [
        [
            *(_line(each.arm), _line(each.baseline), spoken_difference(each)),
            str(each.n),
            *(f"{each.wins} / {each.ties} / {each.losses}", words.p_text(each.p), words.p_text(each.p_corrected)),
            *(each.verdict, _line(each.reason or "")),
        ]
        for each in comparisons
    ]
    return headers, rows


def _csv_row(results: Results, arm: str, column: str) -> dict[str, object]:
    score, size = _score(results, arm, column), results.parameters(arm)
    each = results.comparison(arm, column if column in results.tasks else None)
    row: dict[str, object] = {
        **{"arm": arm, "task": column, "metric": results.metrics.get(column, ""), "mean": score.mean},
        **{"low": score.low, "high": score.high, "n_failed": score.n_failed, "n_missing": score.n_missing},
        "n_ok": len(score.values) if column in results.tasks else "",
        "trainable_parameters": size[1] if size else None,
        **{name: span[1] for name in _PARTS if (span := results.span(arm, name))},
    }
    return row if each is None else row | _csv_comparison("dense", each)


def _csv_comparison(family: str, each: Comparison) -> dict[str, object]:
    return {
        **{"family": family, "baseline": each.baseline, "n_pairs": each.n, "difference": each.mean_difference},
        **{"difference_low": each.low, "difference_high": each.high},
        **{"raw_low": each.raw_low, "raw_high": each.raw_high},
        **{"p": each.p, "p_corrected": each.p_corrected, "wins": each.wins, "ties": each.ties},
        **{"losses": each.losses, "verdict": each.verdict, "remark": each.reason},
    }


def _plain(text: str) -> str:
    """Text in Markdown, where `<` and `_` would mean something."""
    for character in "\\`*_<>[]":
        text = text.replace(character, f"\\{character}")
    return text


def _line(text: str) -> str:
    """The same, for a cell."""
    return _plain(" ".join(text.split()))
