"""What all sections of an experiment file have in common.

A field's description says what is allowed there; error messages are made from it.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from fish_tuning.experiments.config.training_keys import training_argument_problems
from fish_tuning.experiments.config.yaml_files import shortened
from fish_tuning.patterns import compiled


class Section(BaseModel):
    """Unknown keys are errors, values are not converted (`"16"` is no number) and numbers are finite.

    Nothing changes once it is read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def positive_rates(value: list[float]) -> list[float]:
    if not all(rate > 0 for rate in value):
        raise ValueError("must be numbers above 0")
    return unique(value)


def checked_arguments(value: dict[str, Any]) -> dict[str, Any]:
    problems = training_argument_problems(value)
    if problems:
        raise ValueError("\n".join(problems))
    return value


def regular_expression(pattern: str) -> str:
    try:
        compiled(pattern)
    except ValueError as error:
        raise ValueError(f"{shortened(pattern)!r} is {error}") from error
    return pattern


def unique(values: list[Any]) -> list[Any]:
    repeated = [value for number, value in enumerate(values) if value in values[:number]]
    if repeated:
        raise ValueError(f"holds {repeated[0]!r} twice")
    return values
