"""The public names, their laziness, and the examples in their docstrings."""

from __future__ import annotations

import doctest
import gc
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from house import MODULES

import fish_tuning
from fish_tuning.registry import Registry

WITH_EXAMPLES = sorted(name for name, file in MODULES.items() if ">>> " in file.read_text())


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
    assert len(errors) == 6
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


def test_the_library_works_without_the_laboratory(python_environment: dict[str, str], tmp_path: Path) -> None:
    # Of the laboratory's packages, transformers, torch and their like bring some themselves.
    hidden = {"datasets", "matplotlib", "pandas", "pydantic", "scipy", "sklearn", "trl"}
    code = f"""
import importlib.machinery, sys

class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {hidden} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Hiding
import torch
from tiny import Rows, bert, classification_batch, lora
from transformers import TrainingArguments
from fish_tuning import FishTuningTrainer, calculate_fisher_information, create_mask_from_fisher, load_mask, save_mask

model = lora(bert())
scores = calculate_fisher_information(model, [classification_batch()], progress=False)
mask = create_mask_from_fisher(scores, 0.1, ["classifier"], zero_scores="ignore")
args = TrainingArguments({str(tmp_path)!r}, max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
trainer = FishTuningTrainer(model, args, mask=mask, train_dataset=Rows(classification_batch()))
trainer.train()
save_mask(mask, {str(tmp_path / "mask.safetensors")!r})
print(sum(int(tensor.sum()) for tensor in load_mask({str(tmp_path / "mask.safetensors")!r}).values()))
"""
    assert int(run(code, python_environment).splitlines()[-1]) > 0


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: ModuleType = importlib.import_module(name)
    for held in gc.get_objects():
        if type(held) is Registry:  # what an example registers is not to be there for other tests
            monkeypatch.setattr(held, "_members", dict(held))
    results = doctest.testmod(module)
    assert results.failed == 0


def test_public_functions_have_examples() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    for name in ("calculate_fisher_information", "create_mask_from_fisher", "apply_mask", "save_mask"):
        (test,) = finder.find(getattr(fish_tuning, name), name)
        assert test.examples, name
