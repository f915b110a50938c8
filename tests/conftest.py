"""Offline, quiet and on one thread, set before anything imports torch or transformers."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("FISH_TUNING_DEVICE", "cpu") == "cpu":  # what is not asked to compute on a GPU must not find one
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from recorder import Recorder
from transformers.integrations import integration_utils

torch.set_num_threads(1)


def shared_data() -> Path:
    """The folder of real data and models; tests that need it are marked `real_data`."""
    root = Path(__file__).parents[1]
    return Path(os.environ.get("FISH_TUNING_DATA", root / "../shared")).resolve()


@pytest.fixture
def real_data() -> Path:
    folder = shared_data()
    if not folder.is_dir():
        pytest.skip("no real data: set FISH_TUNING_DATA to the folder that holds data/ and models/")
    return folder


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def python_environment() -> dict[str, str]:
    """The environment for a Python process of its own that imports the package and the tests' helpers."""
    import fish_tuning

    folders = [str(Path(fish_tuning.__file__).parents[1]), str(Path(__file__).parent / "helpers")]
    path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "FISH_TUNING_DEVICE": "cpu"}


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Makes `report_to="recorder"` possible; the recorders that Trainers have made of it, in order."""
    monkeypatch.setattr(Recorder, "made", [], raising=False)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    return Recorder.made
