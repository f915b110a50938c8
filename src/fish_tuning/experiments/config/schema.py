"""The JSON schema of an experiment file, by which editors complete and check it.

It follows draft 7, which YAML editors read. What it refuses, the command refuses too. The command alone knows of
names in the data and of what `${NAME}` stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.loaded_weights import DEVICE_MAPS
from fish_tuning.experiments.config.loading import config_directory
from fish_tuning.experiments.config.meanings import MEANINGS
from fish_tuning.experiments.config.methods import INITIALISATIONS
from fish_tuning.experiments.config.task_kinds import task_kinds
from fish_tuning.experiments.config.training_keys import OWNED, training_argument_types
from fish_tuning.experiments.config.yaml_files import read_mapping
from fish_tuning.peft_methods import PEFT_METHODS
from fish_tuning.scores.named import SCORES

SCHEMA_FILE = "fish-tuning.schema.json"  # where `fish-tuning init` looks for it, beside the file that it writes
Schema = dict[str, Any]

# What the reader wraps into a list where it stands alone.
_ONE_OR_SEVERAL = (
    *("dataset", "dataset.load_args", "peft", "seeds"),
    *("fish_tuning.keep_ratio", "fish_tuning.top_layers", "fish_tuning.kept_parameters"),
)
# Sections that may stand without a key: the shipped defaults fill them.
_MAY_BE_EMPTY = ("peft", "lora", "fish_tuning", "training", "training.args_override")
# Names that can be registered, or that are told apart elsewhere: known ones are offered, others are not refused.
_OFFERED: Mapping[str, Callable[[], list[Any]]] = {
    "dataset.task": task_kinds,
    "model.device_map": lambda: list(DEVICE_MAPS),
    "peft.method": lambda: list(PEFT_METHODS),
    "fish_tuning.score": lambda: list(SCORES),
    "lora.init_lora_weights": lambda: [True, False, *INITIALISATIONS],
}
_TRAINING_ARGUMENTS = "TrainingArguments"
_ARGUMENTS = ("training.args_override", "dataset.training_args", "peft.training_args")
_JSON_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "None": "null"}
_VARIABLE = {"type": "string", "pattern": r"\$\{"}


def experiment_schema() -> Schema:
    """A JSON schema (draft 7) of all that an experiment file may hold, with a description of every key."""
    whole = ExperimentConfig.model_json_schema(ref_template="#/definitions/{model}")
    sections = whole.pop("$defs")
    made = _section(whole, sections, "")
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "fish-tuning experiment",
        **made,
        "required": ["model", "dataset"],
        "definitions": {_TRAINING_ARGUMENTS: _training_arguments()},
    }


def _section(section: Schema, sections: Mapping[str, Schema], prefix: str) -> Schema:
    """A section with its keys, written out where it stands: of the same section in two places, keys mean two things."""
    keys = {name: _key(field, sections, f"{prefix}{name}") for name, field in section["properties"].items()}
    required = [name for name in section.get("required", ()) if f"{prefix}{name}" == "model.name"]
    return {
        "type": "object",
        "properties": keys,
        "additionalProperties": False,
        **({"required": required} if required else {}),
    }


def _key(field: Schema, sections: Mapping[str, Schema], key: str) -> Schema:
    made = _value(field, sections, key)
    if key in _ARGUMENTS:
        made = {"allOf": [{"$ref": f"#/definitions/{_TRAINING_ARGUMENTS}"}]}  # beside a reference, all else is ignored
    if key in _OFFERED:
        made = _any_of({"enum": _OFFERED[key]()}, made)
    if "enum" in made or "pattern" in made:
        made = _any_of(made, _VARIABLE)
    if key in _ONE_OR_SEVERAL:
        one = made if key == "dataset" else made["items"]
        several = {"type": "array", "items": made, "minItems": 1} if key == "dataset" else made
        made = _any_of(one, several)
    if key in _MAY_BE_EMPTY:
        made = _any_of(made, {"type": "null"})
    default = {"default": field["default"]} if _is_plain(field.get("default")) else {}
    return {"description": _description(key, field.get("description", "")), **made, **default}


def _description(key: str, allowed: str) -> str:
    """What the key is for, and what is allowed there."""
    meaning = MEANINGS.get(key.removeprefix("peft.") if key.startswith("peft.fish_tuning.") else key, "")
    return f"{meaning}; allowed: {allowed}" if meaning and allowed not in ("", "a section") else meaning or allowed


def _value(field: Schema, sections: Mapping[str, Schema], key: str) -> Schema:
    """What stands under a key: sections in the place of references to them, without pydantic's titles."""
    if reference := field.get("$ref"):
        return _section(sections[reference.rpartition("/")[2]], sections, f"{key}.")
    made = {name: value for name, value in field.items() if name not in ("title", "description", "default")}
    for name in ("anyOf", "allOf"):
        if name in made:
            made[name] = [_value(each, sections, key) for each in made[name]]
    for name in ("items", "additionalProperties"):
        if isinstance(made.get(name), dict):
            made[name] = _value(made[name], sections, key)
    return made


def _any_of(*choices: Schema) -> Schema:
    flat: list[Schema] = []
    for choice in choices:
        flat += choice["anyOf"] if choice.keys() == {"anyOf"} else [choice]
    return {"anyOf": flat}


def _is_plain(default: Any) -> bool:
    return default not in (None, "", [], {}) and not isinstance(default, dict | list)


def _training_arguments() -> Schema:
    """Names and kinds of transformers' TrainingArguments, where its source is found; those that a run sets are none."""
    types = training_argument_types()
    shipped = read_mapping(config_directory() / "base_config.yaml")["training"]["args_override"]
    keys: Schema = {}
    for name, annotation in types.items():
        if name in OWNED:
            continue
        kinds = [_JSON_TYPES.get(kind) for kind in annotation.split(" | ")]
        kind: Schema = {} if None in kinds else {"type": kinds[0] if len(kinds) == 1 else kinds}
        default = {"default": shipped[name]} if name in shipped else {}
        keys[name] = {"description": f"transformers' TrainingArguments: {annotation}", **kind, **default}
    return {"type": "object", "properties": keys, "additionalProperties": not keys}
