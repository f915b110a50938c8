"""Runs the code cells of a notebook in order, as Jupyter does, without Jupyter.

`python tests/helpers/notebooks.py FILE.ipynb ...` runs notebooks and writes what they printed into them.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run(file: Path) -> list[str]:
    """What each code cell prints, the value of its last line included; an error names the cell."""
    names: dict[str, Any] = {"__name__": "__main__"}
    told = []
    for number, cell in enumerate(code_cells(json.loads(file.read_text()))):
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                _run_cell("".join(cell["source"]), names)
        except Exception as error:
            error.add_note(f"in code cell {number} of {file.name}")
            raise
        told.append(printed.getvalue())
    return told


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _run_cell(source: str, names: dict[str, Any]) -> None:
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
        if value is not None:
            sys.stdout.write(f"{value!r}\n")


def write_outputs(file: Path) -> None:
    notebook = json.loads(file.read_text())
    for number, (cell, text) in enumerate(zip(code_cells(notebook), run(file), strict=True), start=1):
        lines = text.splitlines(keepends=True)
        cell["execution_count"] = number
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if text else []
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write_outputs(Path(name))
