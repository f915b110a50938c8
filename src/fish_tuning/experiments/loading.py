"""Read an experiment: shipped defaults, then the file, then `key=value` overrides; every mistake told in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fish_tuning.errors import ConfigurationError, did_you_mean
from fish_tuning.experiments.config import ExperimentConfig

# TrainingArguments' former names, and two keys that users look for elsewhere.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps (a value below 1 is a ratio)",
    "tokenizer": "processing_class",
    "torch_dtype": "model.dtype",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
}
OWNED = {
    "output_dir": "training.output_dir",
    "seed": "seeds",
    "data_seed": "seeds",
}


def load_experiment(path_or_name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The checked experiment of a YAML file, or of a shipped one by its name.

    Args:
        path_or_name: a file, or the name of a shipped experiment with or without `.yaml`.
        overrides: `dotted.key=value` with YAML values, e.g. `training.args_override.learning_rate=1e-4`.

    Raises:
        ConfigurationError: a missing file, bad YAML, unknown keys (with the nearest), values out of range.
    """
    path = _find(os.fspath(path_or_name))
    base = read_yaml(config_directory() / "base_config.yaml")
    merged = _merge(base, read_yaml(path))
    for override in overrides:
        merged = _merge(merged, _parse_override(override))
    merged.setdefault("name", path.stem)
    training = merged.setdefault("training", {})
    if isinstance(training, dict):
        training.setdefault("output_dir", f"results/{merged['name']}")
    try:
        config = ExperimentConfig.model_validate(_expanded(merged))
    except ValidationError as error:
        lines = "\n  ".join(_one_line(detail) for detail in error.errors())
        raise ConfigurationError(f"{path}:\n  {lines}") from error
    _check_training_arguments(config.training.args_override)
    return config


def config_directory() -> Path:
    """Where the shipped configurations lie: inside the installed package, or in the repository of an editable one."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parents[1] / "configs"


def shipped_experiments() -> list[Path]:
    return sorted((config_directory() / "experiments").glob("*.yaml"))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping. Unlike plain PyYAML, `1e-4` is a number and a key that stands twice is an error."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is not valid YAML: {_yaml_problem(error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path} must be a mapping of sections (model, dataset, ...), not a {type(data).__name__}.")
    return data


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats and no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", node.value[number][0].start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + str(getattr(error, "problem", None) or error)


def _find(asked: str) -> Path:
    path = Path(asked).expanduser()
    if path.is_file():
        return path
    shipped = {file.stem: file for file in shipped_experiments()}
    if path.parent == Path() and path.name.removesuffix(".yaml") in shipped:
        return shipped[path.name.removesuffix(".yaml")]
    raise ConfigurationError(
        f"There is no experiment file {asked!r}, and none of that name is shipped ({', '.join(shipped)})."
        f"{did_you_mean(path.stem, shipped)}"
    )


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise ConfigurationError(f"{override!r} is no override; write key=value, e.g. training.args_override.learning_rate=1e-4.")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"The value of {override!r} is not valid YAML: {_yaml_problem(error)}") from error
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def _expanded(value: Any) -> Any:
    """`${NAME}` and `${NAME:-default}` in strings, from the environment."""
    if isinstance(value, dict):
        return {key: _expanded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", _variable, value) if isinstance(value, str) else value


def _variable(match: re.Match[str]) -> str:
    name, default = match.groups()
    value = os.environ.get(name, default)
    if value is None:
        raise ConfigurationError(f"The environment variable {name} is not set; set it or write ${{{name}:-default}}.")
    return value


def _one_line(detail: Any) -> str:
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    if detail["type"] == "extra_forbidden":
        return f"{key}: there is no such key.{_nearest_key(location)}"
    if detail["type"] == "missing":
        return f"{key}: is required."
    return f"{key}: {detail['msg'].removeprefix('Value error, ')} (given: {detail['input']!r})"


def _nearest_key(location: list[str]) -> str:
    if location[-1] in RENAMED:
        return f" It is now called {RENAMED[location[-1]]}."
    keys = _all_keys(ExperimentConfig)
    same_name = [key for key in keys if key.rpartition(".")[2] == location[-1]]
    if same_name:
        return f" Did you mean {same_name[0]!r}?"
    siblings = [key for key in keys if key.rpartition(".")[0] == ".".join(location[:-1])]
    return did_you_mean(".".join(location), siblings) or did_you_mean(location[-1], keys)


def _all_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in schema.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _all_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _check_training_arguments(args: Mapping[str, Any]) -> None:
    import dataclasses

    from transformers import TrainingArguments

    allowed = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for key in args:
        if key in OWNED:
            raise ConfigurationError(f"training.args_override.{key}: set {OWNED[key]} instead; the runner sets this one.")
        if key in RENAMED and (key not in allowed or RENAMED[key] in allowed):
            raise ConfigurationError(f"training.args_override.{key}: is now called {RENAMED[key]}.")
        if key not in allowed:
            raise ConfigurationError(
                f"training.args_override.{key}: transformers' TrainingArguments has no such argument."
                f"{did_you_mean(key, allowed)}"
            )
