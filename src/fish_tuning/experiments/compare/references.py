"""What a score is to be seen beside: a constant answer, and whether any arm is above it. Pure functions of records."""

from __future__ import annotations

from collections.abc import Sequence

from fish_tuning.experiments.compare.paired import TIE
from fish_tuning.experiments.compare.summaries import FEWEST_FOR_INTERVAL, ArmSummary, all_equal, mean_interval
from fish_tuning.experiments.config.arm_names import HEAD_ALONE
from fish_tuning.experiments.records.run_record import RunRecord

UNLEARNED = "\N{DAGGER}"  # the mark of a task that no arm learns


def constant_of(runs: Sequence[RunRecord]) -> float | None:
    """The metric of always giving the same answer; None where no record tells it (language models, older records)."""
    return next((run.constant_value for run in runs if run.constant_value is not None), None)


def constant_name(runs: Sequence[RunRecord]) -> str:
    """What the constant answer is: of numbers the mean, else the largest class."""
    numbers = any("pearson" in run.metrics or "pearson" in run.metric for run in runs)
    return "always the mean" if numbers else "always the largest class"


def nothing_learned(runs: Sequence[RunRecord]) -> bool:
    """Whether no arm's interval lies above the constant answer; False where that cannot be told."""
    constant = constant_of(runs)
    if constant is None:
        return False
    values = {arm: [run.value for run in runs if run.arm == arm and run.value is not None] for arm in _arms(runs)}
    lows = [low for found in values.values() if (low := _lowest(found)) is not None]
    return bool(lows) and all(low <= constant for low in lows)


def _lowest(values: Sequence[float]) -> float | None:
    """The lower end of the values' interval; their own where all seeds are equal, as those of a constant answer are."""
    if len(values) >= FEWEST_FOR_INTERVAL and all_equal(values):
        return values[0]
    return mean_interval(values).low


def _arms(runs: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(run.arm for run in runs if run.status == "ok"))


def with_references(summary: Sequence[ArmSummary], runs: Sequence[RunRecord]) -> list[ArmSummary]:
    """The rows of a table of one task: the constant answer, the head alone, then all other arms."""
    rows = sorted(summary, key=lambda arm: arm.arm != HEAD_ALONE)
    constant = constant_of(runs)
    return rows if constant is None or not rows else [_constant_row(constant, runs, rows[0].metric), *rows]


def _constant_row(constant: float, runs: Sequence[RunRecord], metric: str) -> ArmSummary:
    return ArmSummary(
        arm=constant_name(runs),
        metric=metric,
        n_ok=0,
        n_failed=0,
        trainable_parameters=None,
        kept_parameters=None,
        head_parameters=None,
        mean=constant,
        low=None,
        high=None,
        train_seconds=None,
        fisher_seconds=None,
        peak_memory_bytes=None,
        peak_memory_of="process",
        optimizer_state_bytes=None,
        adapter_bytes=None,
    )


def unlearned_note(task: str, runs: Sequence[RunRecord]) -> str:
    """In words, for a task that no arm learns."""
    return (
        f"No arm is shown to learn {task}: none is above {constant_name(runs)} ({constant_of(runs):.3f}), so "
        "differences between arms say nothing of learning."
    )


def fallen_note(task: str, runs: Sequence[RunRecord]) -> str | None:
    """In words, which arms have seeds that do no better than the constant answer, beside others that do.

    None where there is none, and where no arm learns the task, which says more.
    """
    constant = constant_of(runs)
    if constant is None or nothing_learned(runs):
        return None
    found = []
    for arm in _arms(runs):
        mine = [run for run in runs if run.arm == arm and run.status == "ok" and run.value is not None]
        fallen = [run for run in mine if (run.value or 0.0) <= constant + TIE]
        if arm != HEAD_ALONE and 0 < len(fallen) < len(mine):
            rates = sorted({run.learning_rate for run in fallen if run.learning_rate is not None})
            at = f" at learning rate {', '.join(f'{rate:g}' for rate in rates)}" if rates else ""
            found.append(f"{arm} {len(fallen)} of {len(mine)}{at}")
    if not found:
        return None
    return (
        f"Some seeds do no better on {task} than {constant_name(runs)} ({constant:.3f}), as where training falls "
        f"apart: {', '.join(found)}. The means of these arms tell little of the others. training.trial_seeds chooses "
        "learning rates by several seeds."
    )


def learning_notes(task: str, runs: Sequence[RunRecord]) -> list[str]:
    """What is to be said of whether the task was learned, before anything is compared."""
    note = unlearned_note(task, runs) if nothing_learned(runs) else fallen_note(task, runs)
    return [] if note is None else [note]
