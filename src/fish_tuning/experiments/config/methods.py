"""The sections `lora` and `peft`: the adapters that are compared, and where they start."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_serializer, field_validator, model_validator

from fish_tuning.errors import did_you_mean
from fish_tuning.experiments.config.choices import ChoiceConfig
from fish_tuning.experiments.config.section import (
    Section,
    checked_arguments,
    positive_rates,
    regular_expression,
)

GRADIENT = "gradient"  # ours, not PEFT's: `fish_tuning.start_along_gradient` on the calibration examples
EVA = "eva"  # PEFT's, on the calibration examples
LOOKS_AT_DATA = (GRADIENT, EVA)
# Where one factor of an adapter starts at or near zero, the other scores (nearly) zero, so scores are taken after some
# dense steps; see docs/initialisation.md. `peft_methods.py` says which methods start there.
STARTS_AT_ZERO = (True, "gaussian", *LOOKS_AT_DATA)

# PEFT's initialisations by name that need no settings of their own, and those above.
INITIALISATIONS = ("gaussian", "pissa", "olora", "orthogonal", *LOOKS_AT_DATA)
PISSA_NITER = re.compile(r"pissa_niter_[1-9]\d*")

MOST_RANK = 65536  # above all layers' sizes; what has no bound is counted for hours
HEAD_PATTERN = "modules_to_save"  # where PEFT keeps the head that a task brings


class LoraSection(Section):
    """LoRA, and what other methods take from it: their sizes, their targets and what trains outside the pool.

    Alpha is always 2 x rank, as in the paper.
    """

    baseline_rank: int = Field(default=8, ge=1, le=MOST_RANK, description=f"a whole number from 1 to {MOST_RANK}")
    fish_rank: int = Field(default=16, ge=1, le=MOST_RANK, description=f"a whole number from 1 to {MOST_RANK}")
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
        return value if value is None or isinstance(value, list) else regular_expression(value)

    @field_validator("names_to_exclude")
    @classmethod
    def _compiles(cls, value: list[str]) -> list[str]:
        return [regular_expression(pattern) for pattern in value]

    @field_validator("init_lora_weights")
    @classmethod
    def _known_initialisation(cls, value: bool | str) -> bool | str:
        if isinstance(value, bool) or value in INITIALISATIONS or PISSA_NITER.fullmatch(value):
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
        if not isinstance(data, dict):
            return data
        method = data.get("method", "lora")
        if isinstance(method, list):
            sections = ", ".join(f"{{method: {name}}}" for name in method)
            raise ValueError(f"method is one method; for several write a list of sections: peft: [{sections}]")
        return {"name": method, **data}

    @field_validator("args", "baseline_args", "fish_args")
    @classmethod
    def _bounded(cls, value: dict[str, Any]) -> dict[str, Any]:
        rank = value.get("r")
        if isinstance(rank, int) and rank > MOST_RANK:
            raise ValueError(f"r={rank} must be a whole number from 1 to {MOST_RANK}")
        return value

    @field_validator("name")
    @classmethod
    def _filled(cls, value: str) -> str:
        if not value:
            raise ValueError("must not be empty")
        return value

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, value: list[float]) -> list[float]:
        return positive_rates(value)

    @field_validator("training_args")
    @classmethod
    def _known_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        return checked_arguments(value)
