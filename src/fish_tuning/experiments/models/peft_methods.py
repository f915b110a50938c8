"""From a PEFT method's name and arguments to its PEFT configuration for one model, checked beforehand."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from peft import AdaLoraConfig, EvaConfig, LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING
from torch import nn

from fish_tuning import patterns
from fish_tuning.adapters import AdapterError  # importing it makes its methods known to PEFT
from fish_tuning.adapters.families import find_family, layer_number, matching
from fish_tuning.errors import ConfigurationError, did_you_mean
from fish_tuning.experiments.config.arm_names import Variant
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.methods import EVA, GRADIENT, INITIALISATIONS, PISSA_NITER, PeftMethodConfig
from fish_tuning.experiments.models.base_weights import BaseWeights
from fish_tuning.experiments.models.targets import (
    head_names,
    is_language_model,
    linear_names,
    module_names,
    target_modules,
)
from fish_tuning.peft_methods import (
    ADALORA,
    ATTENTION,
    BASE,
    KEYS_VALUES_AND_FEED_FORWARD,
    NORMS,
    PEFT_METHODS,
    PeftMethod,
    peft_method,
)

# Fields of PEFT's configurations in which a text is a regular expression for the names of modules.
PATTERN_FIELDS = ("target_modules", "exclude_modules", "feedforward_modules", "prefix_modules")
# Fields whose texts PEFT hands to an engine that cannot be stopped, and that stand for no list of names.
_HANDED_ON = ("rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save")
_MOST_REPETITIONS = 3
KEYS_AND_VALUES = ("key", "value", "k_proj", "v_proj", "k_lin", "v_lin", "key_proj", "value_proj")


def method_names() -> list[str]:
    """Every method a `peft` section can name."""
    types = {getattr(kind, "value", kind).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    refused = {name for name, method in PEFT_METHODS.items() if method.cannot_be_compared}
    return sorted((types | PEFT_METHODS.keys()) - refused)


def check_method(section: PeftMethodConfig) -> None:
    """Refuse an unknown method and arguments it does not have, before any model is there."""
    if reason := peft_method(section.method).cannot_be_compared:
        raise ConfigurationError(f"peft.method={section.method!r} cannot run here: {reason}.")
    if section.method not in method_names():
        raise ConfigurationError(
            f"peft.method={section.method!r} is not known.{did_you_mean(section.method, method_names())} Known are "
            f"{', '.join(method_names())}."
        )
    known = _field_names(section.method)
    for key in ("args", "baseline_args", "fish_args"):
        if peft_method(section.method).takes_init_lora_weights:
            _check_initialisation(key, getattr(section, key).get("init_lora_weights", True))
        for name in getattr(section, key):
            if name not in known:
                raise ConfigurationError(
                    f"peft.{key}.{name}: {_config_class(section.method).__name__} has no {name!r}."
                    f"{did_you_mean(name, known)}"
                )


def _check_initialisation(key: str, asked: Any) -> None:
    """As `lora.init_lora_weights` is checked; PEFT's own names that need more settings are known here, too."""
    of_peft = re.findall(r"[\"'](\w+)[\"']", str(LoraConfig.__dataclass_fields__["init_lora_weights"].type))
    allowed = list(dict.fromkeys([*INITIALISATIONS, *of_peft]))
    if isinstance(asked, bool) or asked in allowed or PISSA_NITER.fullmatch(str(asked)):
        return
    raise ConfigurationError(
        f"peft.{key}.init_lora_weights={asked!r}: must be one of true, false, {', '.join(allowed)} or "
        f"pissa_niter_[number].{did_you_mean(str(asked), allowed)}"
    )


def peft_config(config: ExperimentConfig, section: PeftMethodConfig, base: nn.Module, variant: Variant) -> Any:
    """The method's configuration, of PEFT or `BaseWeights`: the smaller one of the baseline, or that of the pool."""
    _check_model(section.method, base)
    changes = section.baseline_args if variant.small else section.fish_args
    given = {**section.args, **changes}
    values = {**_defaults(config, section.method, base, small=variant.small), **given}
    values |= _names_for_patterns(config, values, given, base)
    if variant.top_layers is not None:
        values |= _in_top_layers(section.method, values, base, variant.top_layers)
    if "lora_alpha" in _field_names(section.method) and "lora_alpha" not in given:
        values["lora_alpha"] = 2 * values["init_r" if "init_r" in values else "r"]
    if values.get("init_lora_weights") == GRADIENT:
        values["init_lora_weights"] = True  # it is set once the adapter is there, and saved as an ordinary LoRA
    if values.get("init_lora_weights") == EVA and values.get("eva_config") is None:
        # Ranks stay equal, and with them every arm's count; labels of -100 mark the tokens that do not count.
        values["eva_config"] = EvaConfig(rho=1.0)
    length = values.get("num_virtual_tokens", 1)
    if type(length) is not int or length < 1:
        raise ConfigurationError(f"peft.args.num_virtual_tokens={length!r}: must be a whole number from 1.")
    if section.method == ADALORA and values["init_r"] <= values["target_r"]:
        raise ConfigurationError(
            f"peft.args.init_r={values['init_r']} must be above target_r={values['target_r']}: AdaLoRA starts from "
            "more ranks than it ends with."
        )
    try:
        made: Any = _config_class(section.method)(**values)
    except (TypeError, ValueError) as error:
        key = "baseline_args" if variant.small else "fish_args"
        raise ConfigurationError(f"peft.args or peft.{key} of {section.method}: {error}") from error
    if values.get("init_lora_weights") == EVA and made.eva_config.rho != 1:
        raise ConfigurationError(
            f"peft.args.eva_config: rho={made.eva_config.rho:g} lets EVA move ranks between layers when it sees data, "
            "and with them the counts that arms are compared at. Allowed is rho 1, which keeps ranks equal."
        )
    return made


def _names_for_patterns(
    config: ExperimentConfig, values: Mapping[str, Any], given: Mapping[str, Any], base: nn.Module
) -> dict[str, list[str]]:
    """Regular expressions of the user's as the names of the modules they stand for.

    PEFT matches them with an engine that cannot be stopped, and some would keep it busy for ever.
    """
    _check_handed_on(given)
    asked = {name: given.get(name) for name in PATTERN_FIELDS}
    if isinstance(config.lora.target_modules, str) and values.get("target_modules") == config.lora.target_modules:
        asked["target_modules"] = config.lora.target_modules
    names = [name for name, _ in base.named_modules() if name]
    found = {}
    for field, pattern in asked.items():
        if isinstance(pattern, str) and pattern != "all-linear":
            key = f"peft.args.{field}" if given.get(field) else f"lora.{field}"
            try:
                found[field] = patterns.matching(pattern, names, whole=True)
            except ValueError as error:
                raise ConfigurationError(f"{key}: {pattern!r} is {error}.") from error
            if not found[field]:
                raise ConfigurationError(
                    f"{key}: {pattern!r} stands for none of the modules of {type(base).__name__}; a regular expression "
                    f"must match a module's whole name, such as {names[-1]!r}. Its linear layers are "
                    f"{', '.join(linear_names(base))}."
                )
    return found


def _check_handed_on(given: Mapping[str, Any]) -> None:
    """Refuse patterns that could keep PEFT busy for ever: repetitions of groups, and more than a few repetitions."""
    for field in _HANDED_ON:
        value = given.get(field) or ()
        for pattern in [value] if isinstance(value, str) else list(value):
            text = str(pattern)
            if re.search(r"\)[*+?{]", text) or len(re.findall(r"[*+?{]", text)) > _MOST_REPETITIONS:
                raise ConfigurationError(
                    f"peft.args.{field}: {text[:80]!r} repeats a group, or repeats more than {_MOST_REPETITIONS} "
                    "times. PEFT's engine could take for ever on it; name the modules more plainly."
                )


def size_text(config: Any) -> str:
    """What a method's size is called and how large it is: `r 16`, `30 tokens`, `-` where it has none."""
    if isinstance(config, AdaLoraConfig):
        return f"r {config.init_r} to {config.target_r}"
    texts = {"r": "r {}", "bottleneck_size": "bottleneck {}", "num_virtual_tokens": "{} tokens"}
    sizes = {name: getattr(config, name, None) for name in texts}
    return ", ".join(texts[name].format(size) for name, size in sizes.items() if size) or "-"


def _defaults(config: ExperimentConfig, method: str, base: nn.Module, *, small: bool) -> dict[str, Any]:
    known, names = peft_method(method), _field_names(method)
    if known.virtual_tokens is not None:
        return {"task_type": _peft_task(base), "num_virtual_tokens": known.virtual_tokens}
    size = config.lora.baseline_rank if small else config.lora.fish_rank
    sizes = ("r", "bottleneck_size") if known.r_is_its_size else ()
    values: dict[str, Any] = {name: size for name in sizes if name in names}
    if is_language_model(base) and "task_type" in names:
        values["task_type"] = "CAUSAL_LM"
    if "modules_to_save" in names:
        values["modules_to_save"] = head_names(base)
    if known.takes_init_lora_weights:
        values |= {"lora_dropout": config.lora.dropout, "init_lora_weights": config.lora.init_lora_weights}
    arguments = known.arguments(size) if callable(known.arguments) else known.arguments
    return {**values, **arguments, **_targets(config, known, base, names)}


def _targets(config: ExperimentConfig, known: PeftMethod, base: nn.Module, names: list[str]) -> Mapping[str, Any]:
    if callable(known.targets):
        return known.targets(base)
    if known.targets in _FOUND_TARGETS:
        return _FOUND_TARGETS[known.targets](base)
    asked = known.targets == ATTENTION and "target_modules" in names
    return {"target_modules": target_modules(config.lora.target_modules, base)} if asked else {}


def _peft_task(base: nn.Module) -> str:
    name = type(base).__name__
    return "CAUSAL_LM" if is_language_model(base) else "TOKEN_CLS" if "TokenClassification" in name else "SEQ_CLS"


def _ia3_targets(base: nn.Module) -> dict[str, str]:
    """l_k, l_v and l_ff: the keys and values of the attention, and the input of the feed-forward's second layer."""
    attention = target_modules(None, base)
    keys_and_values = [name for name in attention if name in KEYS_AND_VALUES] or attention  # or the fused projection
    try:
        feed_forward = find_family(base, "peft.args.target_modules and peft.args.feedforward_modules").feedforward_only
    except AdapterError as error:
        raise ConfigurationError(str(error)) from error
    return {
        "target_modules": rf".*\.({'|'.join(keys_and_values)})|{feed_forward}",
        "feedforward_modules": feed_forward,
    }


def _in_top_layers(method: str, values: dict[str, Any], base: Any, number: int) -> dict[str, Any]:
    """What keeps an adapter to the layers nearest the output."""
    depth = base.config.num_hidden_layers
    if number > depth:
        raise ConfigurationError(
            f"fish_tuning.top_layers, pool_layers: {number} layers were asked for, {type(base).__name__} has {depth}."
        )
    layers = list(range(depth - number, depth))
    if "layers_to_transform" in _field_names(method):
        return {"layers_to_transform": layers}
    fields = [name for name in ("target_modules", "feedforward_modules") if values.get(name)]
    if not fields:
        raise ConfigurationError(
            f"protocol fixed_budget: {method} adapts all layers at once, so it has no top layers. Use fixed_layers."
        )
    return {name: [m for m in matching(base, values[name]) if layer_number(m) in layers] for name in fields}


def _norms(base: Any) -> dict[str, list[str]]:
    known = TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING.get(base.config.model_type)
    found = list(known) if known else module_names(base, lambda module: type(module).__name__.endswith("Norm"))
    return {"target_modules": found}


_FOUND_TARGETS: dict[str, Callable[[Any], Mapping[str, Any]]] = {
    KEYS_VALUES_AND_FEED_FORWARD: _ia3_targets,
    NORMS: _norms,
}


def _check_model(method: str, base: nn.Module) -> None:
    """What PEFT would only find out in the first forward pass."""
    name = type(base).__name__
    if peft_method(method).virtual_tokens is not None and name.endswith("ForImageClassification"):
        raise ConfigurationError(f"peft.method={method!r} puts virtual tokens in front of a text; {name} reads images.")
    if method == "prefix_tuning" and "past_key_values" not in _backbone_arguments(base):
        raise ConfigurationError(
            f"peft.method={method!r} cannot adapt {name}: it hands the model past keys and values, which its forward "
            "pass does not take. Use another method, such as lora or serial_adapter."
        )


def _backbone_arguments(base: nn.Module) -> set[str]:
    backbone = getattr(base, getattr(base, "base_model_prefix", ""), base)
    return {name for model in (base, backbone) for name in inspect.signature(model.forward).parameters}


def _config_class(method: str) -> Any:
    if method == BASE:
        return BaseWeights
    name = peft_method(method).peft_type or method.upper()
    types: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING  # beside PEFT's own, those that are added under plain names
    return types[PeftType[name] if name in PeftType.__members__ else name]


def _field_names(method: str) -> list[str]:
    return [field.name for field in fields(_config_class(method)) if field.init]
