"""The console script, with the laboratory's packages and without."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from house import LABORATORY

from fish_tuning.command import LABORATORY as LOOKED_FOR


def started(environment: dict[str, str], hidden: set[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"""
import importlib.machinery, runpy, sys

class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {hidden or set()} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Hiding
sys.argv = ["fish-tuning", *{list(arguments)}]
runpy.run_module("fish_tuning", run_name="__main__")
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("hidden", [{"typer"}, {"datasets", "sklearn"}])
def test_without_the_extra_it_says_which_to_install(python_environment: dict[str, str], hidden: set[str]) -> None:
    done = started(python_environment, hidden, "configs")
    assert done.returncode == 2
    assert "pip install 'fish-tuning[experiments]'" in done.stderr
    assert all(name in done.stderr for name in hidden)
    assert "Traceback" not in done.stderr


def test_with_the_extra_it_runs(python_environment: dict[str, str]) -> None:
    done = started(python_environment, set(), "configs")
    assert done.returncode == 0
    assert "digits" in done.stdout


def test_an_interrupt_while_packages_are_imported_is_no_traceback(python_environment: dict[str, str]) -> None:
    code = """
import builtins, sys
imported = builtins.__import__

def interrupting(name, *rest):
    if name == "typer":
        raise KeyboardInterrupt
    return imported(name, *rest)

builtins.__import__ = interrupting
from fish_tuning.command import main
sys.argv = ["fish-tuning", "configs"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=python_environment, check=False
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_what_is_looked_for_is_what_the_extra_installs() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    named = {name.partition(">")[0] for name in project["optional-dependencies"]["experiments"]}
    imported = {{"pyyaml": "yaml", "scikit-learn": "sklearn"}.get(name, name) for name in named}
    assert imported == set(LOOKED_FOR) == LABORATORY - {"trl"}
