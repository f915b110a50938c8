"""The package's modules by name, and the packages that only its laboratory may need."""

from __future__ import annotations

from pathlib import Path

import fish_tuning

ROOT = Path(fish_tuning.__file__).parent
LABORATORY = {
    *("datasets", "filelock", "jinja2", "markupsafe", "matplotlib", "pydantic", "rich", "scipy", "sklearn"),
    *("trl", "typer", "yaml"),
}


def _name(file: Path) -> str:
    return ".".join(["fish_tuning", *file.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {_name(file): file for file in ROOT.rglob("*.py")}
