"""The public names, their laziness, and the examples in their docstrings."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from types import ModuleType

import pytest

import fish_tuning

MODULES = [
    "scores.batches",
    "masks.budgets",
    "sparse.delta",
    "errors",
    "scores.fisher",
    "scores.losses",
    "scores.layer_rules",
    "scores.probes",
    "training.reporting",
    "scores.scoring_state",
    "masks.selection",
    "sparse.shira",
    "sparse.adapter_names",
    "sparse.applying",
    "sparse.masked_tensors",
    "files.atomic",
    "files.delta_file",
    "files.mask_file",
    "training.checkpoints",
    "training.trainer",
]


def run(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_public_name_is_there() -> None:
    for name in fish_tuning.__all__:
        assert getattr(fish_tuning, name).__name__ == name
        assert getattr(fish_tuning, name).__doc__, f"{name} has no docstring"
    assert set(fish_tuning.__all__) == set(fish_tuning._PUBLIC)
    assert dir(fish_tuning) == sorted(fish_tuning.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", fish_tuning.__version__)


def test_the_three_functions_of_the_readme() -> None:
    from fish_tuning import FishTuningTrainer, calculate_fisher_information, create_mask_from_fisher

    assert all(map(callable, (FishTuningTrainer, calculate_fisher_information, create_mask_from_fisher)))


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="'fish_tuning' has no attribute 'calculate_fish'"):
        fish_tuning.calculate_fish  # noqa: B018


def test_errors_have_one_root() -> None:
    errors = [getattr(fish_tuning, name) for name in fish_tuning.__all__ if name.endswith("Error")]
    assert len(errors) == 5
    assert all(issubclass(error, fish_tuning.FishTuningError) for error in errors)
    assert issubclass(fish_tuning.FishTuningWarning, UserWarning)


def test_import_is_light(python_environment: dict[str, str]) -> None:
    code = "import sys, fish_tuning; print([m for m in ('torch', 'transformers', 'peft', 'numpy') if m in sys.modules])"
    assert run(code, python_environment) == "[]"


def test_scores_and_masks_need_no_trainer(python_environment: dict[str, str]) -> None:
    code = (
        "import sys; from fish_tuning import calculate_fisher_information, create_mask_from_fisher, apply_mask; "
        "print([m for m in ('transformers', 'peft', 'trl', 'datasets') if m in sys.modules])"
    )
    assert run(code, python_environment) == "[]"


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    module: ModuleType = importlib.import_module(f"fish_tuning.{name}")
    results = doctest.testmod(module)
    assert results.failed == 0


def test_public_functions_have_examples() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    for name in ("calculate_fisher_information", "create_mask_from_fisher", "apply_mask", "save_mask"):
        (test,) = finder.find(getattr(fish_tuning, name), name)
        assert test.examples, name
