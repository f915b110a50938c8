"""The sections of an experiment file, their defaults and what is allowed in each key.

A field's description says what is allowed there; error messages are made from it.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

from fish_tuning.errors import did_you_mean
from fish_tuning.experiments.config.arm_names import SELECTIONS
from fish_tuning.experiments.config.task_kinds import BUILT_IN, task_kinds
from fish_tuning.experiments.config.texts import MOST_BYTES_OF_TITLE, check_path
from fish_tuning.experiments.config.training_keys import training_argument_problems
from fish_tuning.experiments.config.yaml_files import shortened
from fish_tuning.patterns import compiled
from fish_tuning.scores.named import SCORES

# An arm is a PEFT method's name, which trains all of the adapter, or that name and a selection's.
DEFAULT_SELECTIONS = ("", "-fish", "-fish-rand", "-fish-rev")

# Where one factor of an adapter starts at or near zero, the other scores (nearly) zero, so scores are taken after some
# dense steps; see docs/initialisation.md. `peft_methods.py` says which start there.
WARMUP_STEPS = 20
GRADIENT = "gradient"  # ours, not PEFT's: `fish_tuning.start_along_gradient` on the calibration examples
EVA = "eva"  # PEFT's, on the calibration examples
LOOKS_AT_DATA = (GRADIENT, EVA)
STARTS_AT_ZERO = (True, "gaussian", *LOOKS_AT_DATA)

# PEFT's initialisations by name that need no settings of their own, and ours.
INITIALISATIONS = ("gaussian", "pissa", "olora", "orthogonal", *LOOKS_AT_DATA)
_PISSA_NITER = re.compile(r"pissa_niter_[1-9]\d*")


HEAD_PATTERN = "modules_to_save"  # where PEFT keeps the head that a task brings

UNNAMED_CONFIGURATIONS = ("main", "default", "plain_text")  # of a data set that has but one


class Section(BaseModel):
    """Unknown keys are errors, values are not converted (`"16"` is no number) and numbers are finite.

    Nothing changes once it is read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The pretrained model: a hub name, a local folder, or a built-in one.

    Adapters train in float32 whatever the dtype; the head trains in `dtype`, as its inputs come in it.
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
        return _checked_arguments(value)

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
        """What the data set is called in tables and folders: the last part of its name, or of its configuration's."""
        named = [name for name in self.load_args[1:] if name not in UNNAMED_CONFIGURATIONS] or self.load_args
        last = named[0] if named else PurePath(next(iter(self.data_files.values()))).parent.name
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


class LoraSection(Section):
    """LoRA, and what other methods take from it: their sizes, their targets and what trains outside the pool.

    Alpha is always 2 x rank, as in the paper.
    """

    baseline_rank: int = Field(default=8, ge=1, description="a whole number from 1")
    fish_rank: int = Field(default=16, ge=1, description="a whole number from 1")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="a number from 0 to below 1")
    target_modules: list[str] | str | None = Field(
        default=None, description="a list of module names, a regular expression, or null to find them from the model"
    )
    names_to_exclude: list[str] = Field(
        default=[HEAD_PATTERN], description="a list of regular expressions for tensors that train densely"
    )
    init_lora_weights: bool | str = Field(
        default=True, description=f"true, false, {', '.join(INITIALISATIONS)} or pissa_niter_[number]"
    )
    freeze_A: bool = Field(default=False, description="true or false")

    @field_validator("target_modules")
    @classmethod
    def _named(cls, value: list[str] | str | None) -> list[str] | str | None:
        if value is not None and not value:
            raise ValueError("must name at least one module; leave it out to find them from the model")
        return value if value is None or isinstance(value, list) else _regular_expression(value)

    @field_validator("names_to_exclude")
    @classmethod
    def _compiles(cls, value: list[str]) -> list[str]:
        return [_regular_expression(pattern) for pattern in value]

    @field_validator("init_lora_weights")
    @classmethod
    def _known_initialisation(cls, value: bool | str) -> bool | str:
        if isinstance(value, bool) or value in INITIALISATIONS or _PISSA_NITER.fullmatch(value):
            return value
        names = ("true", "false", *INITIALISATIONS, "pissa_niter_[number]")
        raise ValueError(f"must be one of {', '.join(names)}.{did_you_mean(value, INITIALISATIONS)}")

    @model_validator(mode="after")
    def _even_for_orthogonal(self) -> LoraSection:
        odd = [key for key in ("baseline_rank", "fish_rank") if getattr(self, key) % 2]
        if self.init_lora_weights == "orthogonal" and odd:
            raise ValueError(
                f"init_lora_weights 'orthogonal' needs even ranks, but {odd[0]} is {getattr(self, odd[0])}"
            )
        return self


class ChoiceConfig(Section):
    """How entries are chosen."""

    score: str = Field(
        default="fisher", description="a score's name, such as fisher, fisher_sampled or fisher_expected"
    )
    num_samples: int = Field(default=128, ge=1, description="a whole number from 1: training examples to score with")
    warmup_steps: int | None = Field(
        default=None,
        ge=0,
        description="a whole number from 0: dense steps before scoring, undone after it; "
        f"null for {WARMUP_STEPS} where B starts at 0, else 0",
    )
    reselect_every: int | None = Field(
        default=None, ge=1, description="a whole number from 1: optimizer steps after which entries are chosen again"
    )
    granularity: Literal["entry", "row", "column", "component"] = Field(
        default="entry", description="entry, row, column or component: what is kept or frozen together"
    )
    floors: dict[str, int | float] | None = Field(
        default=None,
        description="tensor, layer, module_type or regular expressions, and how many entries are kept there at least: "
        "whole numbers from 1, or shares between 0 and 1",
    )
    quotas: dict[str, float] | None = Field(
        default=None,
        description="regular expressions for tensors and their shares of the kept entries, adding up to 1, for the "
        "-fish-quota arms; null for the same keep ratio in every module type",
    )

    @field_validator("score")
    @classmethod
    def _known_score(cls, value: str) -> str:
        if value not in SCORES:
            raise ValueError(f"must be one of {', '.join(SCORES)}.{did_you_mean(value, SCORES)}")
        return value

    @field_validator("quotas")
    @classmethod
    def _adding_up(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for pattern in value or ():
            _regular_expression(pattern)
        if value is not None and (min(value.values(), default=-1) < 0 or abs(sum(value.values()) - 1) > 1e-6):
            raise ValueError(f"must be shares from 0 that add up to 1; they add up to {sum(value.values()):g}")
        return value


class PeftMethodConfig(Section):
    """One PEFT method of the experiment, with the arguments of its PEFT configuration by their own names."""

    method: str = Field(
        default="lora",
        pattern=r"^[a-z0-9_]+$",
        description="a method's name in small letters: lora, dora, serial_adapter, prefix_tuning, ia3, unipelt, or "
        "another one of PEFT's",
    )
    name: str = Field(
        default="",
        pattern=r"^[a-z0-9_]*$",
        description="what its arms are called, in small letters, digits and _: the method's name unless it is given",
    )
    args: dict[str, Any] = Field(default={}, description="names and values of the method's PEFT configuration")
    baseline_args: dict[str, Any] = Field(default={}, description="changes to args for the dense arm")
    fish_args: dict[str, Any] = Field(default={}, description="changes to args for the pool of the masked arms")
    training_args: dict[str, Any] = Field(
        default={}, description="changes to training.args_override for this method's arms, such as learning_rate"
    )

    freeze_A: bool | None = Field(default=None, description="true or false in place of lora.freeze_A, for its arms")
    fish_tuning: ChoiceConfig = Field(
        default=ChoiceConfig(), description=f"a section with any of the keys {', '.join(ChoiceConfig.model_fields)}"
    )
    learning_rates: list[float] = Field(
        default=[], description="a list of numbers above 0 in place of training.learning_rates, for its arms"
    )

    @field_serializer("fish_tuning")
    def _changes_alone(self, value: ChoiceConfig) -> dict[str, Any]:
        """What is written is read again as the same changes, not as every default."""
        return value.model_dump(mode="json", exclude_unset=True)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        """Its name is the method's unless it is given."""
        return {"name": data.get("method", "lora"), **data} if isinstance(data, dict) else data

    @field_validator("name")
    @classmethod
    def _filled(cls, value: str) -> str:
        if not value:
            raise ValueError("must not be empty")
        return value

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, value: list[float]) -> list[float]:
        return _rates(value)

    @field_validator("training_args")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _checked_arguments(value)


class FishTuningConfig(ChoiceConfig):
    """Which arms run, and how their masks are chosen."""

    methods_to_run: list[str] = Field(
        min_length=1,
        description="a list of arms: a method of the section peft, alone or with "
        f"{', '.join('-' + name for name in SELECTIONS)} after it",
    )
    keep_ratio: list[float] = Field(
        default=[0.5, 0.25, 0.1, 0.05, 0.01, 0.005],
        min_length=1,
        description="a list of shares of the pool, above 0 and up to 1, for protocol fixed_layers",
    )
    top_layers: list[int] = Field(
        default=[1, 2, 3, 4],
        min_length=1,
        description="a list of numbers of layers, counted from the output, for protocol fixed_budget",
    )
    pool_layers: int = Field(
        default=5, ge=1, description="a whole number from 1: layers of the pool, for protocol fixed_budget"
    )
    prune_to_ratio_of_baseline: float = Field(default=0.5, gt=0, le=1, description="a number above 0, up to 1")
    kept_parameters: list[int] = Field(
        default=[],
        description="a list of whole numbers from 1: entries that each masked arm trains, for protocol fixed_count",
    )

    @field_validator("methods_to_run")
    @classmethod
    def _different_arms(cls, value: list[str]) -> list[str]:
        return unique(value)

    @field_validator("keep_ratio", "top_layers", "kept_parameters", mode="before")
    @classmethod
    def _wrap(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]

    @field_validator("keep_ratio")
    @classmethod
    def _shares(cls, value: list[float]) -> list[float]:
        if not all(0 < ratio <= 1 for ratio in value):
            raise ValueError("must be numbers above 0, up to 1")
        unique([f"{ratio:g}" for ratio in value])  # as arms are called
        return value

    @field_validator("top_layers", "kept_parameters")
    @classmethod
    def _from_one(cls, value: list[int]) -> list[int]:
        if not all(number >= 1 for number in value):
            raise ValueError("must be whole numbers from 1")
        return unique(value)

    @model_validator(mode="after")
    def _pool_holds_the_budget(self) -> FishTuningConfig:
        if max(self.top_layers) > self.pool_layers:
            raise ValueError(
                f"fish_tuning.top_layers: {max(self.top_layers)} is more than the pool's layers, "
                f"fish_tuning.pool_layers={self.pool_layers}"
            )
        return self


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
        return _rates(value)

    @field_validator("args_override")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _checked_arguments(value)


def _rates(value: list[float]) -> list[float]:
    if not all(rate > 0 for rate in value):
        raise ValueError("must be numbers above 0")
    return unique(value)


def _checked_arguments(value: dict[str, Any]) -> dict[str, Any]:
    problems = training_argument_problems(value)
    if problems:
        raise ValueError("\n".join(problems))
    return value


def _regular_expression(pattern: str) -> str:
    try:
        compiled(pattern)
    except ValueError as error:
        raise ValueError(f"{shortened(pattern)!r} is {error}") from error
    return pattern


def unique(values: list[Any]) -> list[Any]:
    repeated = [value for number, value in enumerate(values) if value in values[:number]]
    if repeated:
        raise ValueError(f"holds {repeated[0]!r} twice")
    return values
