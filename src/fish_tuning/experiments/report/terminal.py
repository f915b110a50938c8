"""The terminal: what is printed there cannot act on it, and holds no value that came from the environment."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from fish_tuning.experiments.config.secrets import scrubbed
from fish_tuning.experiments.config.texts import visible


class PlainConsole(Console):
    """A console whose texts are printed as they are; tables of `plain_table` see to theirs."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(plain(each) if isinstance(each, str) else each for each in objects), **options)


def plain(text: str) -> str:
    return visible(scrubbed(text))
