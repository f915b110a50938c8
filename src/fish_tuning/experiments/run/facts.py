"""What a report tells of an experiment beside its records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fish_tuning.experiments.run.plan import Plan


def report_facts(plan: Plan, chosen_rates: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """The plan's facts, notes and arms, the learning rate that each arm was given where it was chosen, and `more`."""
    arms = [arm.arm for arm in plan.arms]
    return {**plan.facts, **more, "notes": list(plan.notes), "arms": arms, "learning_rates": dict(chosen_rates)}
