"""What an experiment file holds as a whole: its sections, and the arms that follow from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fish_tuning.errors import did_you_mean
from fish_tuning.experiments.config.arm_names import HEAD_ALONE, ArmName, Variant, count_budget, ratio_budget, suffixes
from fish_tuning.experiments.config.choices import DEFAULT_SELECTIONS, ChoiceConfig, FishTuningConfig
from fish_tuning.experiments.config.methods import STARTS_AT_ZERO, LoraSection, PeftMethodConfig
from fish_tuning.experiments.config.section import Section, unique
from fish_tuning.experiments.config.sections import DatasetConfig, ModelConfig, TrainingConfig
from fish_tuning.experiments.config.texts import check_title
from fish_tuning.peft_methods import BASE, WARMUP_STEPS, peft_method


class ExperimentConfig(Section):
    """A whole experiment: one model, one data set, the arms, and the seeds each of them runs with."""

    name: str = Field(default="experiment", description="a name without slashes that begins with no dot")
    model: ModelConfig = Field(description="a section with the key name")
    dataset: DatasetConfig = Field(description="a section with the key load_args, or a list of them")
    peft: list[PeftMethodConfig] = Field(
        default=[PeftMethodConfig()], min_length=1, description="a section with the key method, or a list of them"
    )
    protocol: Literal["ratio_of_baseline", "fixed_layers", "fixed_budget", "fixed_count"] = Field(
        default="ratio_of_baseline", description="ratio_of_baseline, fixed_layers, fixed_budget or fixed_count"
    )
    lora: LoraSection = LoraSection()
    fish_tuning: FishTuningConfig = Field(description="a section")  # always there: its arms follow from peft
    training: TrainingConfig = TrainingConfig()
    seeds: list[int] = Field(
        default=[42, 43, 44], min_length=1, description="a list of one or more different whole numbers from 0"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """What depends on other sections: `training.output_dir` is `results/<name>`, the arms are four of each method
        and the head alone.
        """
        if not isinstance(data, dict):
            return data
        methods = data.get("peft")
        methods = [{}] if methods is None else methods if isinstance(methods, list) else [methods]
        names = [m.get("name") or m.get("method", "lora") for m in methods if isinstance(m, dict)] or ["lora"]
        return {
            **data,
            "peft": methods,
            "training": _with_default(
                data.get("training", {}), "output_dir", f"results/{data.get('name', 'experiment')}"
            ),
            "fish_tuning": _with_default(
                data.get("fish_tuning", {}),
                "methods_to_run",
                [*(f"{name}{selection}" for name in names for selection in DEFAULT_SELECTIONS), HEAD_ALONE],
            ),
        }

    @model_validator(mode="after")
    def _arms_of_methods(self) -> ExperimentConfig:
        names = unique([section.name for section in self.peft])
        if HEAD_ALONE in names:
            raise ValueError(f"peft.name={HEAD_ALONE!r}: is the arm of the head alone; take another.")
        if self.protocol == "fixed_count" and not self.fish_tuning.kept_parameters:
            raise ValueError(
                "fish_tuning.kept_parameters is missing; protocol fixed_count needs a list of whole numbers from 1."
            )
        choices = [self.fish_tuning, *(section.fish_tuning for section in self.peft)]
        if self.training.early_stopping_patience and any(choice.reselect_every for choice in choices):
            raise ValueError(
                "fish_tuning.reselect_every cannot go with training.early_stopping_patience: the best epoch's weights "
                "may belong to an earlier mask. Leave one of the two out."
            )
        if any(section.method == BASE and self.choice_of(section).reselect_every for section in self.peft):
            raise ValueError(
                f"fish_tuning.reselect_every cannot go with peft.method={BASE!r}: what it saves are the entries of its "
                "mask, and those of earlier masks were trained too. Set it to null under the method's own fish_tuning."
            )
        if self.training.trial_seeds > len(self.seeds):
            raise ValueError(
                f"training.trial_seeds={self.training.trial_seeds} is more than there are seeds, {len(self.seeds)}."
            )
        allowed = [f"{name}{selection}" for name in names for selection in ("", *(f"-{s}" for s in suffixes()))]
        allowed.append(HEAD_ALONE)
        for arm in self.fish_tuning.methods_to_run:
            if arm not in allowed:
                raise ValueError(
                    f"fish_tuning.methods_to_run: {arm!r} is no arm; allowed are {', '.join(allowed)}."
                    f"{did_you_mean(arm, allowed)} Other methods are named in the section peft."
                )
        return self

    @property
    def arms(self) -> list[str]:
        """The names of all arms: those of `methods_to_run` at every budget of the protocol, then the head alone."""
        asked = self.fish_tuning.methods_to_run
        names = [ArmName.parse(arm) for arm in asked if arm != HEAD_ALONE]
        return [*self._at_every_budget(names), *(arm for arm in asked if arm == HEAD_ALONE)]

    def _at_every_budget(self, names: list[ArmName]) -> list[str]:
        if self.protocol == "fixed_budget":
            budgets = [f"top{number}" for number in self.fish_tuning.top_layers]
            return [str(replace(name, budget=budget)) for budget in budgets for name in names]
        if self.protocol in ("fixed_layers", "fixed_count"):
            ratios = list(map(ratio_budget, self.fish_tuning.keep_ratio))
            counts = [count_budget(number) for number in self.fish_tuning.kept_parameters]
            budgets = ratios if self.protocol == "fixed_layers" else counts
            dense = [str(name) for name in names if name.selection is None]
            masked = [name for name in names if name.selection is not None]
            return dense + [str(replace(name, budget=budget)) for budget in budgets for name in masked]
        return [str(name) for name in names]

    def variant_of(self, arm: str) -> Variant:
        """The adapter that an arm trains, or chooses its entries from."""
        name = ArmName.parse(arm)
        if arm == HEAD_ALONE:
            return Variant()
        if self.protocol == "fixed_budget":
            return Variant(top_layers=name.top_layers if name.selection is None else self.fish_tuning.pool_layers)
        return Variant(small=name.selection is None and self.protocol == "ratio_of_baseline")

    def method_of(self, arm: str) -> PeftMethodConfig:
        """The section of `peft` that an arm belongs to; one of no settings for the head alone."""
        if arm == HEAD_ALONE:
            return PeftMethodConfig(method=HEAD_ALONE)
        return next(section for section in self.peft if section.name == ArmName.parse(arm).method)

    def choice_of(self, section: PeftMethodConfig) -> ChoiceConfig:
        """How entries of a method's pool are chosen: as `fish_tuning` says, with the method's own changes."""
        own = section.fish_tuning
        return self.fish_tuning.model_copy(update={key: getattr(own, key) for key in own.model_fields_set})

    def choice_of_arm(self, arm: str) -> ChoiceConfig:
        """How an arm's entries are chosen: as those of its method, by the score that its name says, if it says one."""
        choice, selection = self.choice_of(self.method_of(arm)), ArmName.parse(arm).selection
        return choice.model_copy(update={"score": selection.score}) if selection and selection.score else choice

    def learning_rates_of(self, section: PeftMethodConfig) -> list[float]:
        """Those that a method's arms choose from."""
        return section.learning_rates or self.training.learning_rates

    def initialisation(self, arm: str) -> bool | str | None:
        """`init_lora_weights` of an arm's adapter, as the section `lora` or the method's arguments say; else None."""
        section = self.method_of(arm)
        if not peft_method(section.method).takes_init_lora_weights:
            return None
        changes = section.baseline_args if self.variant_of(arm).small else section.fish_args
        init: bool | str = {**section.args, **changes}.get("init_lora_weights", self.lora.init_lora_weights)
        return init

    def pool_initialisation(self, section: PeftMethodConfig) -> bool | str:
        """The same of the adapter that a method's masked arms choose from."""
        init: bool | str = {**section.args, **section.fish_args}.get("init_lora_weights", self.lora.init_lora_weights)
        return init

    def freezes_A(self, section: PeftMethodConfig) -> bool:
        """Whether a method's factor A stays as it starts."""
        asked = self.lora.freeze_A if section.freeze_A is None else section.freeze_A
        return asked and peft_method(section.method).takes_init_lora_weights

    def warmup_steps(self, section: PeftMethodConfig) -> int:
        """Dense steps before scoring: as asked for, else what the method's start needs."""
        asked = self.choice_of(section).warmup_steps
        if asked is not None:
            return asked
        known = peft_method(section.method)
        if known.takes_init_lora_weights:
            zero = self.pool_initialisation(section) in STARTS_AT_ZERO
            return WARMUP_STEPS if zero and not self.freezes_A(section) else 0
        return 0 if known.starts_away_from_zero else WARMUP_STEPS

    def warmup_steps_done(self, section: PeftMethodConfig) -> int:
        """`warmup_steps` as they are made: each needs an example, and none is seen twice."""
        return min(self.warmup_steps(section), self.choice_of(section).num_samples)

    def start(self, section: PeftMethodConfig, scores: bool = True) -> str:
        """The starting point of a method's adapter, and of its scores if it has any, in words."""
        words = []
        if peft_method(section.method).takes_init_lora_weights:
            init = self.pool_initialisation(section)
            words.append(f"init_lora_weights {str(init).lower() if isinstance(init, bool) else init}")
        if self.freezes_A(section):
            words.append("A frozen")
        steps = self.warmup_steps_done(section)
        scored = f"scored after {steps} warm-up steps" if steps else "scored at its start"
        return ", ".join([*words, scored] if scores and (steps or not words) else words) or "its own start"

    @field_validator("name")
    @classmethod
    def _stays_in_its_folder(cls, value: str) -> str:
        return check_title(value)

    @field_validator("seeds", mode="before")
    @classmethod
    def _wrap(cls, value: Any) -> Any:
        return [value] if type(value) is int else value

    @field_validator("seeds")
    @classmethod
    def _usable_seeds(cls, value: list[int]) -> list[int]:
        if not all(0 <= seed < 2**32 for seed in value):
            raise ValueError("must be whole numbers from 0 to 4294967295")
        return unique(value)


def _with_default(section: Any, key: str, value: Any) -> Any:
    return {key: value, **section} if isinstance(section, dict) else section
