"""The section `fish_tuning`: which arms run, and how their entries are chosen."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fish_tuning.errors import did_you_mean
from fish_tuning.experiments.config.arm_names import SELECTIONS, ratio_budget
from fish_tuning.experiments.config.section import Section, regular_expression, unique
from fish_tuning.peft_methods import WARMUP_STEPS
from fish_tuning.scores.named import SCORES

# An arm is a PEFT method's name, which trains all of the adapter, or that name and a selection's.
DEFAULT_SELECTIONS = ("", "-fish", "-fish-rand", "-fish-rev")


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
            regular_expression(pattern)
        if value is not None and (min(value.values(), default=-1) < 0 or abs(sum(value.values()) - 1) > 1e-6):
            raise ValueError(f"must be shares from 0 that add up to 1; they add up to {sum(value.values()):g}")
        return value


class FishTuningConfig(ChoiceConfig):
    """Which arms run, and how their masks are chosen."""

    methods_to_run: list[str] = Field(
        min_length=1,
        description="a list of arms: a method of the section peft, alone or with "
        f"{', '.join('-' + name for name in SELECTIONS)} after it, or with a score's name, as in lora-gain",
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
        unique(list(map(ratio_budget, value)))  # as arms are called
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
