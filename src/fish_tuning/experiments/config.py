"""What an experiment file may hold: the sections, their defaults and what is allowed in each key.

A field's description says what is allowed there; error messages are made from it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fish_tuning.errors import did_you_mean
from fish_tuning.experiments.arm_names import SELECTIONS, ArmName, Variant
from fish_tuning.experiments.training_keys import training_argument_problems

# An arm is a PEFT method's name, which trains all of the adapter, or that name and a selection's.
DEFAULT_SELECTIONS = ("", "-fish", "-fish-rand", "-fish-rev")

# Where one factor of an adapter starts at or near zero, the other scores (nearly) zero, so scores are taken after some
# dense steps; see docs/initialisation.md. These methods do not start there.
WARMUP_STEPS = 20
STARTS_AT_ZERO = (True, "gaussian")
LORA_METHODS = ("lora", "dora")  # those that lora.init_lora_weights starts
STARTS_AWAY_FROM_ZERO = ("ia3", "ln_tuning", "prefix_tuning", "prompt_tuning", "p_tuning")

# PEFT's initialisations by name that need neither data nor settings of their own.
INITIALISATIONS = ("gaussian", "pissa", "olora", "orthogonal")
_PISSA_NITER = re.compile(r"pissa_niter_[1-9]\d*")


class Section(BaseModel):
    """Unknown keys are errors, values are not converted (`"16"` is no number), and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelConfig(Section):
    """The pretrained model: a hub name, a local folder, or a built-in one.

    Adapters train in float32 whatever the dtype; the head trains in `dtype`, as its inputs come in it.
    """

    name: str = Field(min_length=1, description="a model's name on the hub or its folder")
    config_overrides: dict[str, Any] = Field(
        default={}, description="names and values of the model's own configuration"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="float32, bfloat16 or float16"
    )


class DatasetConfig(Section):
    """The data set. What is left out is found from the data: text columns, label column, splits."""

    load_args: list[str] = Field(
        min_length=1,
        description="the arguments of datasets.load_dataset: a name or a folder, and maybe a configuration",
    )
    text_column: str | list[str] | None = Field(default=None, description="the name of a text column, or a list of two")
    label_column: str | None = Field(default=None, description="the name of a column")
    train_split: str | None = Field(default=None, description="the name of a split")
    validation_split: str | None = Field(default=None, description="the name of a split")
    max_train_samples: int | None = Field(default=None, ge=1, description="a whole number from 1, or null for all")
    training_args: dict[str, Any] = Field(
        default={}, description="changes to training.args_override for this data set, such as num_train_epochs"
    )

    @field_validator("training_args")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _checked_arguments(value)

    @field_validator("load_args", mode="before")
    @classmethod
    def _wrap(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("load_args")
    @classmethod
    def _filled(cls, value: list[str]) -> list[str]:
        if not all(value):
            raise ValueError("must not hold an empty name")
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
        default=["modules_to_save"], description="a list of regular expressions for tensors that train densely"
    )
    init_lora_weights: bool | str = Field(
        default=True, description=f"true, false, {', '.join(INITIALISATIONS)} or pissa_niter_[number]"
    )

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


class PeftMethodConfig(Section):
    """One PEFT method of the experiment, with the arguments of its PEFT configuration by their own names."""

    method: str = Field(
        default="lora",
        pattern=r"^[a-z0-9_]+$",
        description="a method's name in small letters: lora, dora, serial_adapter, prefix_tuning, ia3, unipelt, or "
        "another one of PEFT's",
    )
    args: dict[str, Any] = Field(default={}, description="names and values of the method's PEFT configuration")
    baseline_args: dict[str, Any] = Field(default={}, description="changes to args for the dense arm")
    fish_args: dict[str, Any] = Field(default={}, description="changes to args for the pool of the masked arms")
    training_args: dict[str, Any] = Field(
        default={}, description="changes to training.args_override for this method's arms, such as learning_rate"
    )

    @field_validator("training_args")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _checked_arguments(value)


class FishTuningConfig(Section):
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
    num_samples: int = Field(default=128, ge=1, description="a whole number from 1: training examples to score with")
    warmup_steps: int | None = Field(
        default=None,
        ge=0,
        description="a whole number from 0: dense steps before scoring, undone after it; "
        f"null for {WARMUP_STEPS} where B starts at 0, else 0",
    )

    quotas: dict[str, float] | None = Field(
        default=None,
        description="regular expressions for tensors and their shares of the kept entries, adding up to 1, for the "
        "-fish-quota arms; null for the same keep ratio in every module type",
    )

    @field_validator("methods_to_run")
    @classmethod
    def _different_arms(cls, value: list[str]) -> list[str]:
        return _unique(value)

    @field_validator("keep_ratio", "top_layers", mode="before")
    @classmethod
    def _wrap(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]

    @field_validator("keep_ratio")
    @classmethod
    def _shares(cls, value: list[float]) -> list[float]:
        if not all(0 < ratio <= 1 for ratio in value):
            raise ValueError("must be numbers above 0, up to 1")
        return _unique(value)

    @field_validator("top_layers")
    @classmethod
    def _layers(cls, value: list[int]) -> list[int]:
        if not all(number >= 1 for number in value):
            raise ValueError("must be whole numbers from 1")
        return _unique(value)

    @model_validator(mode="after")
    def _pool_holds_the_budget(self) -> FishTuningConfig:
        if max(self.top_layers) > self.pool_layers:
            raise ValueError(
                f"fish_tuning.top_layers: {max(self.top_layers)} is more than the pool's layers, "
                f"fish_tuning.pool_layers={self.pool_layers}"
            )
        return self

    @field_validator("quotas")
    @classmethod
    def _adding_up(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None and (min(value.values(), default=-1) < 0 or abs(sum(value.values()) - 1) > 1e-6):
            raise ValueError(f"must be shares from 0 that add up to 1; they add up to {sum(value.values()):g}")
        return value


class TrainingConfig(Section):
    """How every arm is trained. `args_override` holds names and values of transformers' `TrainingArguments`."""

    max_seq_length: int = Field(default=128, ge=1, description="a whole number from 1: tokens an example is cut to")
    output_dir: str = Field(default="results", min_length=1, description="a folder's name")
    learning_rates: list[float] = Field(
        default=[],
        description="a list of numbers above 0: each arm's is chosen on a part of the training set; empty for the one "
        "in args_override",
    )
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        description="a whole number from 1: epochs without a better metric after which a run stops and goes back to "
        "its best epoch; null to train to the end",
    )
    args_override: dict[str, Any] = Field(default={}, description="names and values of transformers' TrainingArguments")

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, value: list[float]) -> list[float]:
        if not all(rate > 0 for rate in value):
            raise ValueError("must be numbers above 0")
        return _unique(value)

    @field_validator("args_override")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _checked_arguments(value)


class ExperimentConfig(Section):
    """A whole experiment: one model, one data set, the arms, and the seeds each of them runs with."""

    name: str = Field(default="experiment", pattern=r"^[^/\\]+$", description="a name without slashes")
    model: ModelConfig = Field(description="a section with the key name")
    dataset: DatasetConfig = Field(description="a section with the key load_args")
    peft: list[PeftMethodConfig] = Field(
        default=[PeftMethodConfig()], min_length=1, description="a section with the key method, or a list of them"
    )
    protocol: Literal["ratio_of_baseline", "fixed_layers", "fixed_budget"] = Field(
        default="ratio_of_baseline", description="ratio_of_baseline, fixed_layers or fixed_budget"
    )
    lora: LoraSection = LoraSection()
    fish_tuning: FishTuningConfig = Field(description="a section")  # always there: its arms follow from peft
    training: TrainingConfig = TrainingConfig()
    seeds: list[int] = Field(default=[42, 43, 44], min_length=1, description="a list of different whole numbers from 0")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """What depends on other sections: `training.output_dir` is `results/<name>`, and each method has four arms."""
        if not isinstance(data, dict):
            return data
        methods = data.get("peft")
        methods = [{}] if methods is None else methods if isinstance(methods, list) else [methods]
        names = [method.get("method", "lora") for method in methods if isinstance(method, dict)] or ["lora"]
        return {
            **data,
            "peft": methods,
            "training": _with_default(
                data.get("training", {}), "output_dir", f"results/{data.get('name', 'experiment')}"
            ),
            "fish_tuning": _with_default(
                data.get("fish_tuning", {}),
                "methods_to_run",
                [f"{name}{selection}" for name in names for selection in DEFAULT_SELECTIONS],
            ),
        }

    @model_validator(mode="after")
    def _arms_of_methods(self) -> ExperimentConfig:
        names = _unique([method.method for method in self.peft])
        allowed = [f"{name}{selection}" for name in names for selection in ("", *(f"-{s}" for s in SELECTIONS))]
        for arm in self.fish_tuning.methods_to_run:
            if arm not in allowed:
                raise ValueError(
                    f"fish_tuning.methods_to_run: {arm!r} is no arm; allowed are {', '.join(allowed)}."
                    f"{did_you_mean(arm, allowed)} Other methods are named in the section peft."
                )
        return self

    @property
    def arms(self) -> list[str]:
        """The names of all arms: those of `methods_to_run`, at every budget of the protocol."""
        names = [ArmName.parse(arm) for arm in self.fish_tuning.methods_to_run]
        if self.protocol == "fixed_layers":
            budgets = [f"{ratio:g}" for ratio in self.fish_tuning.keep_ratio]
            dense = [str(name) for name in names if name.selection is None]
            masked = [name for name in names if name.selection is not None]
            return dense + [str(replace(name, budget=budget)) for budget in budgets for name in masked]
        if self.protocol == "fixed_budget":
            budgets = [f"top{number}" for number in self.fish_tuning.top_layers]
            return [str(replace(name, budget=budget)) for budget in budgets for name in names]
        return [str(name) for name in names]

    def variant_of(self, arm: str) -> Variant:
        """The adapter that an arm trains, or chooses its entries from."""
        name = ArmName.parse(arm)
        if self.protocol == "fixed_budget":
            return Variant(top_layers=name.top_layers if name.selection is None else self.fish_tuning.pool_layers)
        return Variant(small=name.selection is None and self.protocol == "ratio_of_baseline")

    def method_of(self, arm: str) -> PeftMethodConfig:
        """The PEFT method that an arm trains."""
        return next(method for method in self.peft if method.method == ArmName.parse(arm).method)

    def warmup_steps(self, method: str) -> int:
        """Dense steps before scoring: as asked for, else what the method's start needs."""
        if self.fish_tuning.warmup_steps is not None:
            return self.fish_tuning.warmup_steps
        if method in LORA_METHODS:
            return WARMUP_STEPS if self.lora.init_lora_weights in STARTS_AT_ZERO else 0
        return 0 if method in STARTS_AWAY_FROM_ZERO else WARMUP_STEPS

    def start(self, method: str) -> str:
        """The starting point of a method's adapter and of the scores, in words."""
        init = self.lora.init_lora_weights
        text = f"init_lora_weights {str(init).lower() if isinstance(init, bool) else init}"
        words = [text] if method in LORA_METHODS else []
        steps = self.warmup_steps(method)
        scored = f"scored after {steps} warm-up steps" if steps else "scored at its start"
        return ", ".join([*words, scored] if steps or not words else words)

    @field_validator("seeds", mode="before")
    @classmethod
    def _wrap(cls, value: Any) -> Any:
        return [value] if type(value) is int else value

    @field_validator("seeds")
    @classmethod
    def _usable_seeds(cls, value: list[int]) -> list[int]:
        if not all(0 <= seed < 2**32 for seed in value):
            raise ValueError("must be whole numbers from 0 to 4294967295")
        return _unique(value)


def _with_default(section: Any, key: str, value: Any) -> Any:
    return {key: value, **section} if isinstance(section, dict) else section


def _checked_arguments(value: dict[str, Any]) -> dict[str, Any]:
    problems = training_argument_problems(value)
    if problems:
        raise ValueError("\n".join(problems))
    return value


def _regular_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern


def _unique(values: list[Any]) -> list[Any]:
    repeated = [value for number, value in enumerate(values) if value in values[:number]]
    if repeated:
        raise ValueError(f"holds {repeated[0]!r} twice")
    return values
