"""The console script: looks for the laboratory's packages before it imports what needs them."""

from __future__ import annotations

import sys
from importlib.util import find_spec

# Of the extra `experiments`, by the names that are imported.
LABORATORY = (
    *("datasets", "filelock", "jinja2", "markupsafe", "matplotlib", "pydantic", "rich", "scipy", "sklearn", "typer"),
    "yaml",
)


def main() -> None:
    """The `fish-tuning` command; exit code 2 where the extra is not installed, 130 where it is interrupted."""
    try:
        _command()
    except KeyboardInterrupt:  # while packages are imported, which takes its time
        sys.stderr.write("interrupted\n")
        sys.exit(130)


def _command() -> None:
    missing = [name for name in LABORATORY if find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"error: the command needs packages that are not installed ({', '.join(missing)}). Install them with\n"
            "  pip install 'fish-tuning[experiments]'\n"
        )
        sys.exit(2)
    from fish_tuning.cli import main as command

    command()
