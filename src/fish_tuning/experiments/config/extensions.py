"""Code of the user's that registers selections, scores, tasks, pictures or PEFT methods for experiments to name.

It is named on the command line or installed as a package, never in an experiment file: a file that is passed on must
not be able to run code.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from fish_tuning.errors import ConfigurationError

GROUP = "fish_tuning.extensions"  # the entry points of installed packages


def load_extensions(named: Sequence[str]) -> None:
    """Import `named`, each a module's name or a Python file, after what installed packages bring.

    Raises ConfigurationError where there is no such module or file, or where importing it fails.
    """
    for point in entry_points(group=GROUP):
        _import(point.value, point.value.partition(":")[0])
    for name in named:
        _import(name, name)


def _import(shown: str, name: str) -> None:
    try:
        if name.endswith(".py"):
            _run_file(Path(name).expanduser())
        elif "/" in name or os.sep in name:
            raise ConfigurationError(f"--extension {shown}: a file must be one of Python, which ends in .py.")
        else:
            importlib.import_module(name)
    except ConfigurationError:
        raise
    except Exception as error:  # it is the user's code: whatever it raises is told, with its place
        raise ConfigurationError(f"--extension {shown}: {type(error).__name__}: {error}") from error


def _run_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigurationError(f"--extension {path}: there is no such file.")
    name = f"fish_tuning_extension_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"--extension {path}: it cannot be read as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
