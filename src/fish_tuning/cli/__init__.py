"""The command line. Everything heavy is imported inside the command that needs it, so that --help answers at once.

One module a command; `application` holds what they share: the app, exit codes, and how things are told.
"""

from __future__ import annotations

from fish_tuning.cli import configs, init, inspect, plan, report, run, schema, sharing
from fish_tuning.cli.application import app, main
from fish_tuning.cli.run import HERE, How, run_command

__all__ = [
    "HERE", "How", "app", "configs", "init", "inspect", "main", "plan", "report", "run", "run_command", "schema",
    "sharing",
]  # fmt: skip
