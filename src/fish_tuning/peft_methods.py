"""One table of what must be known of PEFT's methods beyond PEFT's own tables. Imports nothing heavy.

A method that is not in it is treated as most are: a part of it starts at or near zero, its size is `r` or
`bottleneck_size` where it has one, and it adapts the attention's input projections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fish_tuning.registry import Registry

# Dense steps before scoring where a start needs them; see docs/initialisation.md.
WARMUP_STEPS = 20

# The method of the runner, not of PEFT, whose pool is the base model's own weights.
BASE = "base"
ADALORA = "adalora"

# Methods whose layers compute with the whole weight, which bitsandbytes' layers of so many bits do not hold. DoRA's
# copy of an 8-bit layer leaves it without its scales.
NEEDS_WHOLE_WEIGHTS: Mapping[int, frozenset[str]] = {
    4: frozenset(
        ("adamss", "deft", "delora", "frod", "glora", "hra", "loha", "lokr", "osf", "peanut", "psoft", "supertuning",
         "tinylora")
    ),
    8: frozenset(("adamss", "delora", "dora", "frod", "glora", "osf", "psoft", "supertuning", "tinylora")),
}  # fmt: skip

# Which modules a method adapts unless it is told.
ATTENTION, OWN = "attention", "own"
KEYS_VALUES_AND_FEED_FORWARD, NORMS = "keys, values and feed-forward", "norms"


@dataclass(frozen=True)
class PeftMethod:
    """What is known of one method.

    Args:
        peft_type: PEFT's name of it, where that is not the method's own name.
        arguments: of PEFT's configuration, which make the method this one; or a function from its size to them.
        takes_init_lora_weights: whether `lora.init_lora_weights` starts it.
        starts_away_from_zero: no factor starts at or near zero, so that its start can be scored as it is.
        r_is_its_size: false where more of `r` means fewer parameters.
        targets: ATTENTION (the input projections), OWN (it finds them itself), another of the names above, or a
            function from the base model to the arguments that name them.
        virtual_tokens: how many it puts in front of a text unless it is told; None for methods that put none.
        tuner: class name of PEFT's tuner, where `cannot_be_masked` is to be told on a model.
        cannot_be_scored, cannot_be_masked, cannot_be_compared: the reason and the way out; empty where it can.
    """

    peft_type: str = ""
    arguments: Mapping[str, Any] | Callable[[int], Mapping[str, Any]] = field(default_factory=dict)
    takes_init_lora_weights: bool = False
    starts_away_from_zero: bool = False
    r_is_its_size: bool = True
    targets: str | Callable[[Any], Mapping[str, Any]] = ATTENTION
    virtual_tokens: int | None = None
    tuner: str = ""
    cannot_be_scored: str = ""
    cannot_be_masked: str = ""
    cannot_be_compared: str = ""


PEFT_METHODS: Registry[PeftMethod] = Registry("PEFT method")


def peft_method(name: str) -> PeftMethod:
    """What is known of a method; of one that is not in the table, what holds of most."""
    return PEFT_METHODS.get(name, PeftMethod())


def register_peft_method(name: str, method: PeftMethod) -> None:
    """Tell of a method of your own, which PEFT knows already (its configuration and tuner are in PEFT's tables).

    Example:
        >>> from fish_tuning import PeftMethod, register_peft_method
        >>> register_peft_method("my_lora", PeftMethod(peft_type="LORA", starts_away_from_zero=True))
    """
    PEFT_METHODS.register(name)(method)


def refusal(tuners: set[str], what: str) -> str | None:
    """Why a model with PEFT tuners of these class names cannot be "scored" or "masked"; None where it can."""
    reasons = (getattr(method, f"cannot_be_{what}") for method in PEFT_METHODS.values() if method.tuner in tuners)
    return next((reason for reason in reasons if reason), None)


def _adalora(size: int) -> dict[str, Any]:
    """It starts from half as many ranks again as it ends with; how many steps there are is set when training begins."""
    return {"target_r": size, "init_r": max(size + 1, 3 * size // 2), "total_step": 10**9}


_AVERAGES = (
    "Lily's router averages over the batch, so no example has a loss of its own; it can neither be scored exactly nor "
    "masked by such scores. Use LoRA."
)

for _name, _method in {
    "lora": PeftMethod(takes_init_lora_weights=True),
    "dora": PeftMethod("LORA", arguments={"use_dora": True}, takes_init_lora_weights=True),
    "ia3": PeftMethod(starts_away_from_zero=True, targets=KEYS_VALUES_AND_FEED_FORWARD),
    "ln_tuning": PeftMethod(starts_away_from_zero=True, targets=NORMS),
    # 30 and 20 virtual tokens, as in the papers
    "prefix_tuning": PeftMethod(starts_away_from_zero=True, virtual_tokens=30),
    "prompt_tuning": PeftMethod(starts_away_from_zero=True, virtual_tokens=20),
    "p_tuning": PeftMethod(starts_away_from_zero=True, virtual_tokens=20),
    "serial_adapter": PeftMethod(targets=OWN),
    "unipelt": PeftMethod(targets=OWN),
    BASE: PeftMethod(starts_away_from_zero=True),
    "oft": PeftMethod(r_is_its_size=False),  # r is a number of blocks
    ADALORA: PeftMethod(
        arguments=_adalora,
        r_is_its_size=False,  # it has no r, but a rank that it starts from and a mean one that it ends with
        tuner="AdaLoraModel",
        cannot_be_masked="AdaLoRA prunes its tensors itself and its loss needs them whole; it cannot be masked. Use "
        "LoRA.",
    ),
    "tinylora": PeftMethod(
        tuner="TinyLoraModel",
        cannot_be_masked="TinyLoRA keeps references to its one tensor past the modules, which a mask cannot follow. "
        "Use VB-LoRA or Uni-LoRA.",
    ),
    "lily": PeftMethod(tuner="LilyModel", cannot_be_scored=_AVERAGES, cannot_be_masked=_AVERAGES),
    "xlora": PeftMethod(cannot_be_compared="it mixes LoRA adapters that are trained already"),
    "trainable_tokens": PeftMethod(
        cannot_be_compared="it trains rows of the embedding that belong to new tokens, and no task here adds any"
    ),
    "adaption_prompt": PeftMethod(cannot_be_compared="it is made for LLaMA language models alone; use prefix_tuning"),
    "multitask_prompt_tuning": PeftMethod(cannot_be_compared="it needs a task for each example"),
    "cpt": PeftMethod(cannot_be_compared="it needs a context of its own"),
    "cartridge": PeftMethod(cannot_be_compared="it needs a context of its own"),
    "poly": PeftMethod(cannot_be_compared="it needs a task for each example"),
}.items():
    register_peft_method(_name, _method)
