"""The sections `model`, `dataset` and `training`: what is trained on what, and how."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fish_tuning.errors import did_you_mean
from fish_tuning.experiments.config.loaded_weights import (
    DEVICE_MAPS,
    QuantizationConfig,
    checked_device,
    checked_memory,
)
from fish_tuning.experiments.config.section import Section, checked_arguments, positive_rates
from fish_tuning.experiments.config.task_kinds import BUILT_IN, task_kinds
from fish_tuning.experiments.config.texts import MOST_BYTES_OF_TITLE, check_path

_SPLIT_AT_END = re.compile(r"(^|[-_.])(train(ing)?|validation|valid|val|dev|test)$", re.I)
UNNAMED_CONFIGURATIONS = ("main", "default", "plain_text")  # of a data set that has but one


class ModelConfig(Section):
    """The pretrained model: a hub name, a local folder, or a built-in one.

    Adapters train in float32 whatever the dtype; the head trains in `dtype`, as its inputs come in it. On quantised
    weights all that is not quantised is float32, head included, as PEFT prepares it.
    """

    name: str = Field(min_length=1, description="a model's name on the hub or its folder")

    @field_validator("name")
    @classmethod
    def _possible(cls, value: str) -> str:
        return check_path(value)

    config_overrides: dict[str, Any] = Field(
        default={}, description="names and values of the model's own configuration"
    )
    revision: str | None = Field(default=None, description="a branch, tag or commit of the hub's model")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="float32, bfloat16 or float16"
    )
    quantization_config: QuantizationConfig | None = Field(
        default=None, description="a section with load_in_4bit: true or load_in_8bit: true"
    )
    device_map: str | int | dict[str, str | int] | None = Field(
        default=None,
        description=f"{', '.join(DEVICE_MAPS)}, a device such as cuda:1, or names of modules and their devices",
    )
    max_memory: dict[str, str | int] | None = Field(
        default=None, description="devices and the memory to fill of each, such as {0: 20GiB, 1: 20GiB}"
    )

    @field_validator("device_map")
    @classmethod
    def _known_devices(cls, value: Any) -> Any:
        if isinstance(value, dict):
            if not value:
                raise ValueError("names no module; '' is the whole model")
            return {name: checked_device(device) for name, device in value.items()}
        return value if value in DEVICE_MAPS or value is None else checked_device(value, DEVICE_MAPS)

    @field_validator("max_memory")
    @classmethod
    def _memory_of_devices(cls, value: dict[str, str | int] | None) -> dict[str, str | int] | None:
        return checked_memory(value)

    @model_validator(mode="after")
    def _memory_with_its_map(self) -> ModelConfig:
        if self.max_memory is not None and self.device_map not in DEVICE_MAPS:
            raise ValueError(
                f"model.max_memory bounds what a device_map of {', '.join(DEVICE_MAPS)} fills; model.device_map is "
                f"{self.device_map!r}. Set it to one of them, or leave out max_memory."
            )
        return self


class DatasetConfig(Section):
    """The data set. What is left out is found from the data: text columns, label column, splits."""

    load_args: list[str] = Field(
        default=[],
        description="the arguments of datasets.load_dataset: a name or a folder, and maybe a configuration",
    )
    data_files: dict[str, str] = Field(
        default={},
        description="names of splits and their csv, tsv, json, jsonl or parquet files, in place of load_args",
    )
    revision: str | None = Field(default=None, description="a branch, tag or commit of the hub's data set")
    task: str | None = Field(default=None, description=f"{', '.join(BUILT_IN)}, or null to find it from the data")
    metric: str | None = Field(default=None, description="a metric's name, or null for the task's usual one")
    text_column: str | list[str] | None = Field(default=None, description="the name of a text column, or a list of two")
    image_column: str | None = Field(default=None, description="the name of a column of images")
    label_column: str | None = Field(default=None, description="the name of a column")
    prompt_column: str | list[str] | None = Field(
        default=None, description="the name of a column of questions or instructions, or a list of such columns"
    )
    completion_column: str | None = Field(default=None, description="the name of a column of answers")
    chat_template: bool | None = Field(
        default=None, description="true, false, or null for the tokenizer's chat template where it has one"
    )
    max_new_tokens: int = Field(default=256, ge=1, description="a whole number from 1: tokens of a generated answer")
    train_split: str | None = Field(default=None, description="the name of a split")
    validation_split: str | float | None = Field(
        default=None, description="the name of a split, or a share of the training split to hold out"
    )
    max_train_samples: int | None = Field(default=None, ge=1, description="a whole number from 1, or null for all")
    max_validation_samples: int | None = Field(default=None, ge=1, description="a whole number from 1, or null for all")
    training_args: dict[str, Any] = Field(
        default={}, description="changes to training.args_override for this data set, such as num_train_epochs"
    )

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str | None) -> str | None:
        if value is not None and value not in task_kinds():
            kinds = task_kinds()
            hint = did_you_mean(value, kinds)
            raise ValueError(f"must be {', '.join(kinds)}, or null to find it from the data.{hint}")
        return value

    @field_validator("training_args")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        return checked_arguments(value)

    @model_validator(mode="after")
    def _one_source(self) -> DatasetConfig:
        if bool(self.load_args) == bool(self.data_files):
            raise ValueError("needs either load_args or data_files")
        return self

    @property
    def source(self) -> str:
        """Where the data comes from, in words."""
        return " ".join(self.load_args) or ", ".join(self.data_files.values())

    @property
    def task_name(self) -> str:
        """What the data set is called in tables and folders: the last part of its name, or of its configuration's.

        Single files are called like the first of them, or like its folder where it is named after its split alone.
        """
        named = [name for name in self.load_args[1:] if name not in UNNAMED_CONFIGURATIONS] or self.load_args
        last = named[0] if named else _name_of_file(PurePath(next(iter(self.data_files.values()))))
        name = PurePath(last).name.removeprefix("builtin:").lstrip(".")  # never a folder above, nor a hidden one
        return name if 0 < len(name.encode()) <= MOST_BYTES_OF_TITLE else "data"

    @field_validator("load_args", mode="before")
    @classmethod
    def _wrap(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("load_args")
    @classmethod
    def _filled(cls, value: list[str]) -> list[str]:
        if not all(value):
            raise ValueError("must not hold an empty name")
        return [check_path(name) for name in value]

    @field_validator("data_files")
    @classmethod
    def _possible(cls, value: dict[str, str]) -> dict[str, str]:
        return {name: check_path(path) for name, path in value.items()}

    @field_validator("validation_split")
    @classmethod
    def _share(cls, value: str | float | None) -> str | float | None:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError("a share must be above 0 and below 1")
        return value

    @field_validator("prompt_column")
    @classmethod
    def _some(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None and not value:
            raise ValueError("must name at least one column")
        return value

    @field_validator("text_column")
    @classmethod
    def _one_or_two(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) not in (1, 2):
            raise ValueError("must be the name of a text column, or a list of two")
        return value


def _name_of_file(path: PurePath) -> str:
    """`reviews` for reviews.csv, reviews-train.csv and reviews/train.csv."""
    stem = path.name.partition(".")[0] if not path.name.startswith(".") else path.stem
    name = _SPLIT_AT_END.sub("", stem)
    return name or path.parent.name


class TrainingConfig(Section):
    """How every arm is trained. `args_override` holds names and values of transformers' `TrainingArguments`."""

    max_seq_length: int = Field(default=128, ge=1, description="a whole number from 1: tokens an example is cut to")
    output_dir: str = Field(default="results", min_length=1, description="a folder's name")
    learning_rates: list[float] = Field(
        default=[],
        description="a list of numbers above 0: each arm's is chosen on a part of the training set; empty for the one "
        "in args_override",
    )
    choose_by: Literal["metric", "loss"] = Field(
        default="metric", description="metric or loss: what learning_rates are chosen by on held-out training data"
    )
    trial_seeds: int = Field(
        default=1,
        ge=1,
        description="a whole number from 1: with how many of the first seeds each of learning_rates is tried",
    )
    head_learning_rate: float | None = Field(
        default=None, gt=0, description="a number above 0: the learning rate of the head alone; null for that of all"
    )
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        description="a whole number from 1: epochs without a better metric after which a run stops and goes back to "
        "its best epoch; null to train to the end",
    )
    args_override: dict[str, Any] = Field(default={}, description="names and values of transformers' TrainingArguments")

    @field_validator("output_dir")
    @classmethod
    def _possible(cls, value: str) -> str:
        return check_path(value)

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, value: list[float]) -> list[float]:
        return positive_rates(value)

    @field_validator("args_override")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        return checked_arguments(value)
