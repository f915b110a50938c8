"""From a file's name and `key=value` overrides to a checked experiment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from pydantic import ValidationError

from fish_tuning.errors import ConfigurationError, did_you_mean
from fish_tuning.experiments.config.config_errors import readable
from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.neighbours import nearest_file
from fish_tuning.experiments.config.secrets import (
    is_secret_name,
    keep_names,
    names_of_ours,
    redacted,
    remember,
    remember_literal,
    remember_whole,
    scrubbed,
)
from fish_tuning.experiments.config.texts import text_problems, visible
from fish_tuning.experiments.config.yaml_files import MOST_DEPTH, parse, read_mapping

SUFFIXES = (".yaml", ".yml")  # of experiment files
_VARIABLE = re.compile(r"\$\{(\w+)(?::-((?:[^}$]|\$(?!\{))*))?\}")  # a default holds no ${, which also keeps this quick


def load_experiment(path_or_name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The one experiment of a file; see `load_experiments`. ConfigurationError when it lists several data sets."""
    experiments = load_experiments(path_or_name, overrides)
    if len(experiments) > 1:
        raise ConfigurationError(f"{os.fspath(path_or_name)} lists {len(experiments)} data sets; one was expected.")
    return experiments[0]


def load_experiments(path_or_name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> list[ExperimentConfig]:
    """Read an experiment file, one experiment for each of its data sets: shipped defaults, the file, the overrides.

    Args:
        path_or_name: a YAML file, or the name of a shipped experiment (`shipped_experiments()`).
        overrides: `key=value` with dotted keys and YAML values, e.g. `training.args_override.learning_rate=1e-4`.

    `${NAME}` and `${NAME:-default}` in texts are replaced from the environment. `name` is the file's stem by default.

    Raises:
        ConfigurationError: a missing file, a syntax error, an unknown key or a value that is not allowed.
    """
    path = _find(os.fspath(path_or_name))
    data = {"name": path.stem} | read_mapping(path)
    source = f"{path} with {' '.join(overrides)}" if overrides else str(path)
    return experiments_of(data, source, overrides)


def experiments_of(data: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> list[ExperimentConfig]:
    """As `load_experiments`, from what a file holds; `source` is named in errors."""
    merged = merge(read_mapping(config_directory() / "base_config.yaml"), data)
    for override in overrides:
        merged = merge(merged, parse_override(override))
    data = dict(expand_variables(merged))
    if not isinstance(data.get("dataset"), list):
        return [_validated(data, source)]
    experiments = [_validated({**data, "dataset": dataset}, source) for dataset in data["dataset"]]
    names = [experiment.dataset.task_name for experiment in experiments]
    repeated = [name for number, name in enumerate(names) if name in names[:number]]
    if repeated or not names:
        what = f"lists {repeated[0]!r} twice" if repeated else "lists no data set"
        raise ConfigurationError(f"{source}:\ndataset {what}; each needs a folder of its own.")
    return [_in_its_folder(experiment) for experiment in experiments]


def _validated(data: dict[str, Any], source: str) -> ExperimentConfig:
    if problems := list(text_problems(data)):
        raise ConfigurationError("\n".join([f"{source}:", *problems]))
    try:
        experiment = ExperimentConfig.model_validate(data)
    except ValidationError as error:
        # Without its cause, which quotes the values.
        raise ConfigurationError(scrubbed(f"{source}:\n{readable(error, redacted(data))}")) from None
    keep_names([*names_of_ours(data), *experiment.arms, *(section.name for section in experiment.peft)])
    return experiment


def _in_its_folder(experiment: ExperimentConfig) -> ExperimentConfig:
    """One of several data sets: under its own name, in a folder of its own."""
    task = experiment.dataset.task_name
    training = experiment.training.model_copy(update={"output_dir": f"{experiment.training.output_dir}/{task}"})
    return experiment.model_copy(update={"name": f"{experiment.name}-{task}", "training": training})


def config_directory() -> Path:
    """Where the shipped configurations are: inside an installed package, or at the root of a working copy."""
    package = Path(__file__).parents[2]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parents[1] / "configs"


def shipped_experiments() -> dict[str, Path]:
    """The shipped experiments by name."""
    return {path.stem: path for path in sorted((config_directory() / "experiments").glob("*.yaml"))}


def shipped_file(name: str) -> Path:
    """The file of a shipped experiment. Raises ConfigurationError, which names the nearest, where there is none."""
    shipped = shipped_experiments()
    if found := shipped.get(name.removesuffix(".yaml")):
        return found
    raise ConfigurationError(
        f"{visible(name)!r} is no shipped experiment; shipped are {', '.join(shipped)}.{did_you_mean(name, shipped)}"
    )


def describe(path: Path) -> str:
    """The first comment line of a configuration file."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` over it, section by section, each of a list too. An empty section changes nothing."""
    merged = dict(base)
    for key, value in changes.items():
        before = merged.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping | None):
            merged[key] = merge(before, value or {})
        elif isinstance(value, Mapping) and isinstance(before, list) and all(isinstance(s, Mapping) for s in before):
            merged[key] = [merge(section, value) for section in before]
        else:
            merged[key] = value
    return merged


def parse_override(override: str) -> dict[str, Any]:
    """`a.b=1` as `{"a": {"b": 1}}`."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) > MOST_DEPTH:
        raise ConfigurationError(
            f"{override!r} is no override: write key=value, such as seeds=[1,2] or "
            "training.args_override.learning_rate=1e-4."
        )
    remember_literal(key.strip(), _VARIABLE.sub("", text).strip(" []{}\"'"))
    value = parse(text, f"The override {scrubbed(override)!r}")
    for part in reversed(parts):
        value = {part: value}
    return dict(value)


def expand_variables(value: Any, key: str = "") -> Any:
    """`value` with `${NAME}` and `${NAME:-default}` replaced in every text, however deep."""
    if isinstance(value, Mapping):
        return {name: expand_variables(item, f"{key}.{name}".lstrip(".")) for name, item in value.items()}
    if isinstance(value, list):
        return [expand_variables(item, key) for item in value]
    if not isinstance(value, str):
        return value
    remember_literal(key, _VARIABLE.sub("", value))
    hidden: list[bool] = []

    def replace(match: re.Match[str]) -> str:
        name, default = match.groups()
        from_environment = os.environ.get(name)
        if from_environment:
            hidden.append(remember(name, from_environment, key))
            _check_is_no_secret(name, key)
        found = from_environment or default
        if found is None:
            raise ConfigurationError(
                f"{key}: the environment variable {name} is not set. Set it, or write ${{{name}:-default}}."
            )
        return found

    expanded = _VARIABLE.sub(replace, value)
    if any(hidden) and not _VARIABLE.fullmatch(value):
        remember_whole(expanded, _VARIABLE.sub(_told, value))
    if key == "training.output_dir" and not _VARIABLE.fullmatch(value):
        _check_stays_below(value, expanded)
    return expanded


def _told(match: re.Match[str]) -> str:
    """What is written for a variable: itself, or its default where that is what was taken."""
    name, default = match.groups()
    return f"${{{name}}}" if os.environ.get(name) else str(default)


def _check_is_no_secret(variable: str, key: str) -> None:
    """Refuse a secret as a method's name: its arms are called by it, in files and in their names."""
    if key == "peft.name" and is_secret_name(variable):
        raise ConfigurationError(
            f"{key}: the variable {variable} is named like a secret, and arms and files would be called by it. Write a "
            "name, or take it from another variable."
        )


def _check_stays_below(written: str, expanded: str) -> None:
    """Refuse a variable in the middle of a path that leads out of the folder that is written before it."""
    if PurePath(expanded).parts.count("..") > PurePath(written).parts.count(".."):
        raise ConfigurationError(
            f"training.output_dir={written!r}: a variable's value leads to a folder above. Set the variable to a name, "
            "or write the whole path into it."
        )


def _find(path_or_name: str) -> Path:
    try:
        path = Path(path_or_name).expanduser()
        if path.is_file():
            return path
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user's home, or no path at all
        raise ConfigurationError(f"{visible(path_or_name[:200])!r} is no file's name: {error}") from error
    shipped = shipped_experiments()
    name = path_or_name.removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    what = "is a folder" if path.is_dir() else "is neither a file nor a shipped experiment"
    raise ConfigurationError(
        f"{path_or_name!r} {what}; give a YAML file or a shipped name; shipped are {', '.join(shipped)}."
        f"{nearest_file(path, SUFFIXES, shipped)}"
    )
