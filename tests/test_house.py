"""The rooms of the package: imports only go down, no module is part of a circle, and the core needs no laboratory."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from house import LABORATORY, MODULES

# From the bottom; a room may use those before it, and itself.
ROOMS = ("config", "data", "models", "records", "compare", "masks", "report", "run", "costs")


def imports(name: str, *, at_once: bool = False) -> Iterator[str]:
    """Every module that a module imports, inside functions too unless `at_once`; not what type checkers alone read."""
    tree = ast.parse(MODULES[name].read_text())
    if at_once:
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def room(name: str) -> str | None:
    parts = name.split(".")
    return parts[2] if parts[:2] == ["fish_tuning", "experiments"] and len(parts) > 2 else None


def test_every_laboratory_module_is_in_a_room() -> None:
    assert {room(name) for name in MODULES if name.startswith("fish_tuning.experiments.")} == set(ROOMS)


def test_arrows_between_rooms_go_down() -> None:
    up = [
        (name, used)
        for name in MODULES
        for used in imports(name)
        if room(name) and room(used) and ROOMS.index(room(used) or "") > ROOMS.index(room(name) or "")
    ]
    assert up == []


def test_no_circle() -> None:
    arrows = {name: {used for used in imports(name) if used in MODULES and used != name} for name in MODULES}
    # Take away what imports nothing that is left, again and again: what stays is in a circle, or hangs on one.
    while free := [name for name, used in arrows.items() if not used]:
        arrows = {name: used.difference(free) for name, used in arrows.items() if used}
    assert arrows == {}


def test_the_core_needs_nothing_of_the_laboratory() -> None:
    core = [
        name
        for name in MODULES
        if not name.startswith(
            ("fish_tuning.experiments", "fish_tuning.cli", "fish_tuning.command", "fish_tuning.__main__")
        )
    ]
    needed = [
        (name, used)
        for name in core
        for used in imports(name)
        if used.split(".")[0] in LABORATORY or used.startswith("fish_tuning.experiments")
    ]
    assert needed == []


def test_configurations_are_read_without_torch() -> None:
    heavy = {"torch", "transformers", "peft", "datasets", "numpy"}
    seen, left = set(), [name for name in MODULES if room(name) == "config"]
    while left:
        name = left.pop()
        seen.add(name)
        used = set(imports(name, at_once=True))
        assert not {each.split(".")[0] for each in used} & heavy, name
        left += [each for each in used if each in MODULES and each not in seen]
