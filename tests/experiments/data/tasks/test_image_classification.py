from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from task_helpers import task_of
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

from fish_tuning.errors import ConfigurationError
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.data.digests import data_digest
from fish_tuning.experiments.data.tasks import encode
from fish_tuning.experiments.run.plan import plan_experiment
from fish_tuning.experiments.run.runner import run_experiment


def write_images(folder: Path, number: int = 12, shade: int = 200) -> Path:
    """Dark and light images in folders of their classes' names."""
    random = np.random.default_rng(0)
    for split in ("train", "validation"):
        for kind, value in (("dark", 30), ("light", shade)):
            (folder / split / kind).mkdir(parents=True)
            for index in range(number):
                pixels = random.integers(value - 30, value + 30, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / kind / f"{index}.png")
    return folder


def write_vit(folder: Path) -> Path:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    ViTForImageClassification(config).vit.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}'
    )
    return folder


def test_a_folder_of_images_is_found_and_made_into_pixels(tmp_path: Path) -> None:
    task = task_of(write_images(tmp_path / "shades"))
    assert (task.kind, task.columns, task.labels) == ("image_classification", ("image",), ("dark", "light"))
    processor = AutoImageProcessor.from_pretrained(write_vit(tmp_path / "vit"))
    train = encode(task, processor, 1).train
    batch = task.collator(processor)([train[0], train[-1]])
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["labels"].tolist() == [0, 1]
    assert batch["pixel_values"][0].max() < batch["pixel_values"][1].min()


def test_the_digest_is_of_the_pixels_not_of_the_files_names(tmp_path: Path) -> None:
    one, same = (task_of(write_images(tmp_path / name, 2)).train for name in ("one", "same"))
    other = task_of(write_images(tmp_path / "other", 2, shade=190)).train
    assert data_digest(one) == data_digest(same) != data_digest(other)


def test_images_are_learned(experiment: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    config = experiment(
        f"model.name={write_vit(tmp_path / 'vit')}",
        f"dataset.load_args=[{write_images(tmp_path / 'shades')}]",
        "fish_tuning.methods_to_run=[lora-fish]",
        "training.args_override.num_train_epochs=4",
        "training.args_override.learning_rate=0.02",
        "training.args_override.per_device_train_batch_size=4",
    )
    (record,) = run_experiment(config, plan_experiment(config))
    assert record.status == "ok", record.error
    assert record.value is not None
    assert record.value > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_column": "picture"}, "no column 'picture'; found: image, label"),
        ({"image_column": "label"}, "'label' is ClassLabel.*a column of images is needed, found: image"),
        ({"metric": "f1_micro"}, "does not fit shades, which is image classification with 2 classes"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        task_of(write_images(tmp_path / "shades", 2), **settings)


def test_images_need_classes(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        columns = {"pixel_values": [[[[0.0]]], [[[1.0]]]], "label": [0.5, 1.5]}
        (tmp_path / "d").mkdir(exist_ok=True)
        Dataset.from_dict(columns).to_parquet(tmp_path / "d" / f"{split}.parquet")
    with pytest.raises(ConfigurationError, match="images need a class each"):
        task_of(tmp_path / "d")
