from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from folders import write_bert, write_sentences

from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.loading import load_experiment

Settings = dict[str, object]


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def sentences_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentences(tmp_path_factory.mktemp("data") / "reviews")


@pytest.fixture
def experiment(tmp_path: Path, bert_folder: Path, sentences_folder: Path) -> Callable[..., ExperimentConfig]:
    """`experiment("key=value", ...)`: a small experiment on a tiny BERT, with overrides."""
    file = tmp_path / "small.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "model": {"name": str(bert_folder)},
                "dataset": {"load_args": [str(sentences_folder)]},
                "lora": {"baseline_rank": 2, "fish_rank": 4},
                "fish_tuning": {"num_samples": 8, "prune_to_ratio_of_baseline": 0.5},
                "training": {
                    "output_dir": str(tmp_path / "results"),
                    "args_override": {"num_train_epochs": 1, "per_device_train_batch_size": 16, "use_cpu": True},
                },
                "seeds": [1],
            }
        )
    )
    return lambda *overrides: load_experiment(file, overrides)
