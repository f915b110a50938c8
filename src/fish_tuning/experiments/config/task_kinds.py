"""The names of the kinds of tasks; the tasks themselves are in the room `data`, which registers them here."""

from __future__ import annotations

from typing import Any

from fish_tuning.registry import Registry

BUILT_IN = ("text_classification", "image_classification", "token_classification", "causal_lm")
TASKS: Registry[Any] = Registry("dataset.task")


def task_kinds() -> list[str]:
    """The built-in kinds, and those that code of the user's has registered."""
    return [*BUILT_IN, *(name for name in TASKS if name not in BUILT_IN)]
