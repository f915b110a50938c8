"""Data sets on disk, and the tasks that they are read as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, Features

from fish_tuning.experiments.config.sections import DatasetConfig
from fish_tuning.experiments.data.tasks import Task, load_task


def task_of(folder: Path, **settings: Any) -> Task:
    return load_task(DatasetConfig(load_args=[str(folder)], **settings))


def write_split(folder: Path, split: str, columns: dict[str, list[Any]], features: Features | None = None) -> None:
    folder.mkdir(exist_ok=True)
    Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
