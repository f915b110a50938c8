"""The one results table, for Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fish_tuning.experiments.compare.comparisons import SIGNIFICANT, Comparison
from fish_tuning.experiments.compare.numbers import bound, number, signed
from fish_tuning.experiments.compare.summaries import ArmSummary
from fish_tuning.experiments.config.texts import visible

if TYPE_CHECKING:
    from rich.table import Table


def table_rows(summary: Sequence[ArmSummary]) -> tuple[list[str], list[list[str]]]:
    """The headers and one row of cells for each arm."""
    metric = summary[0].metric if summary else "metric"
    measured = dict.fromkeys(arm.peak_memory_of for arm in summary if arm.peak_memory_bytes is not None)
    memory = " or ".join("GPU" if of == "gpu" else of for of in measured)
    headers = [
        "arm",
        "trainable parameters, kept + head",
        f"{metric}, mean [95 % interval]",
        "train s",
        "Fisher s",
        f"peak memory ({memory or 'process'})",
        "optimizer state",
        "adapter",
    ]
    return headers, [_row(arm) for arm in summary]


def _row(arm: ArmSummary) -> list[str]:
    return [
        arm.arm,
        parameters_text(arm.trainable_parameters, arm.kept_parameters, arm.head_parameters),
        score_text(arm),
        _seconds(arm.train_seconds),
        _seconds(arm.fisher_seconds),
        human_bytes(arm.peak_memory_bytes),
        human_bytes(arm.optimizer_state_bytes),
        human_bytes(arm.adapter_bytes),
    ]


def score_text(arm: ArmSummary) -> str:
    """`0.812 [0.801, 0.823] (1 of 4 failed)`: interval and remark where there are any."""
    failed = f"{arm.n_failed} of {arm.n_ok + arm.n_failed} failed" if arm.n_failed else ""
    if arm.mean is None:
        return failed or "-"
    interval = "" if arm.low is None or arm.high is None else f" [{number(arm.low)}, {number(arm.high)}]"
    return f"{number(arm.mean)}{interval}" + (f" ({failed})" if failed else "")


def parameters_text(total: int | None, kept: int | None, head: int | None) -> str:
    """`3,397 = 3,072 + 325`: kept entries and head, where the records tell them apart."""
    if total is None:
        return "-"
    return f"{total:,}" if kept is None or head is None else f"{total:,} = {kept:,} + {head:,}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:,.1f}"


def human_bytes(size: int | None) -> str:
    """`512 B`, `12.3 kB`, `1.9 GB`: powers of a thousand; `-` for None."""
    if size is None:
        return "-"
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.95:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """Columns of words (`left`, by number) to the left, the others, which are numbers, to the right."""
    lines = [headers, ["---" if column in left else "---:" for column in range(len(headers))], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def harmless(cell: Any) -> Any:
    """A text that no spreadsheet takes for a formula; numbers stay numbers."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


def plain_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str | None = None,
    *,
    left: Collection[int] = (0,),
) -> Table:
    """A table for the terminal in plain ASCII, which any terminal and any log shows as it is."""
    from rich.box import Box
    from rich.table import Table
    from rich.text import Text

    from fish_tuning.experiments.report.terminal import plain

    # Cells are names of ours and numbers, which hold nothing of the environment.
    headers, rows = [visible(header) for header in headers], [[visible(cell) for cell in row] for row in rows]
    rule = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
    table = Table(
        title=Text(plain(title), style="bold") if title else None,
        title_justify="left",
        box=rule,
        show_edge=False,
        pad_edge=False,
    )
    table.padding = (0, 1, 0, 0)  # with the space of the rule: two between columns
    for column, header in enumerate(headers):
        # Headers wrap at words. A score and its interval stay on one line; a remark in parentheses may go below.
        cells = [line for row in rows for line in row[column].partition(" (")[0].split("\n")]
        width = max(map(len, [*header.split(), *cells]))
        table.add_column(Text(header), justify="left" if column in left else "right", width=width, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def console_tables(summary: Sequence[ArmSummary], width: int, title: str | None = None) -> list[Table]:
    """The results for a terminal of that many columns: one table, or two where one does not fit."""
    headers, rows = table_rows(summary)
    whole = plain_table(headers, rows, title=title)
    if _width(whole) <= width:
        return [whole]
    results, costs = range(3), (0, *range(3, len(headers)))
    measured = [row for row in rows if {row[i] for i in costs[1:]} != {"-"}]
    return [
        plain_table([headers[i] for i in columns], [[row[i] for i in columns] for row in shown], title=title)
        for columns, shown, title in ((results, rows, title), (costs, measured, None))
    ]


DIFFERENCE_TEXTS = (0, 1, 4)  # columns of words


def difference_rows(compared: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """The headers and one row of cells for each difference."""
    headers = ["arm", "baseline", "difference", "95 % interval, corrected", "verdict", "seeds"]
    return headers, [[each.arm, each.baseline, *_difference(each)] for each in compared]


def _difference(each: Comparison) -> list[str]:
    told = bound if each.verdict in SIGNIFICANT else signed  # a difference that is one is not told as 0.000
    mean = "-" if each.mean_difference is None else told(each.mean_difference)
    interval = "-" if each.low is None or each.high is None else f"[{bound(each.low)}, {bound(each.high)}]"
    return [mean, interval, each.verdict, str(each.n)]


def difference_table(compared: Sequence[Comparison], width: int) -> Table:
    """The differences for a terminal of that many columns; where names are long, an arm stands above its baseline."""
    headers, rows = difference_rows(compared)
    beside = _with_verdicts_wrapped(plain_table(headers, rows, left=DIFFERENCE_TEXTS), width)
    if _width(beside) <= width:
        return beside
    rows = [[f"{arm}\n- {baseline}", *cells] for arm, baseline, *cells in rows]
    return _with_verdicts_wrapped(plain_table(["arm\n- baseline", *headers[2:]], rows, left=(0, 3)), width)


def _with_verdicts_wrapped(table: Table, width: int) -> Table:
    """The table with as much room for its last column but one as `width` leaves, and at least for its longest word."""
    verdict = table.columns[-2]
    words = max(len(word) for cell in (verdict.header, *verdict.cells) for word in str(cell).split())
    verdict.width = max(words, min(verdict.width or 0, (verdict.width or 0) + width - _width(table)))
    return table


def _width(table: Table) -> int:
    return sum(column.width or 0 for column in table.columns) + 2 * (len(table.columns) - 1)  # two between columns


def plan_rows(arms: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    """The table of a dry run, from `ArmPlan`s."""
    headers = ["arm", "size", "pool", "kept", "share kept", "head, dense", "trainable parameters"]
    rows = [
        [
            plan.arm,
            plan.size,
            f"{plan.pool:,}",
            f"{plan.kept:,}",
            f"{plan.kept / plan.pool:.1%}" if plan.pool else "-",
            f"{plan.dense:,}",
            f"{plan.trainable_parameters:,}",
        ]
        for plan in arms
    ]
    return headers, rows


def fact_text(value: Any) -> str:
    """A fact as a reader wants it: `query, key` for a list, `torch 2.13, peft 0.21` for a mapping."""
    if isinstance(value, Mapping):
        separator = "; " if any("," in fact_text(item) for item in value.values()) else ", "
        return separator.join(f"{key} {fact_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(fact_text, value)) or "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
