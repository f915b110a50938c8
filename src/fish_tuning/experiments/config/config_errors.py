"""From pydantic's errors to lines a user can act on: the key, what was given, what is allowed, the nearest key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, TypeGuard, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fish_tuning.experiments.config.experiment import ExperimentConfig
from fish_tuning.experiments.config.training_keys import training_argument_types

# Old or foreign names outside `training.args_override`, which has its own list.
_OLD_KEYS = {"model.torch_dtype": "model.dtype", "model.path": "model.name", "dataset.name": "dataset.load_args"}


def readable(error: ValidationError, data: Mapping[str, Any]) -> str:
    """One line for each wrong key. `data` is what was validated, to name the value that was found."""
    lines: dict[str, None] = {}  # an ordered set: a union reports each of its members
    for details in error.errors(include_url=False, include_context=True):
        for line in _explain(details, data).splitlines():
            lines[line] = None
    return "\n".join(lines)


def all_keys() -> list[str]:
    """Every dotted key of an experiment file, the TrainingArguments included."""
    return [*_keys(ExperimentConfig), *(f"training.args_override.{name}" for name in training_argument_types())]


def _explain(details: ErrorDetails, data: Mapping[str, Any]) -> str:
    if details["type"] == "extra_forbidden":
        return _unknown_key(".".join(part for part in details["loc"] if isinstance(part, str)))
    parts, field = _known_part(details["loc"])
    key = ".".join(part for part in parts if isinstance(part, str))
    allowed = (field.description if field else None) or "a section"
    if details["type"] == "missing":
        return f"{key} is missing; it must be {allowed}."
    section = _section(field)
    if details["type"] in ("model_type", "model_attributes_type") and section is not None:
        return f"{key}={_found(parts, data)}: must be a section with the keys {', '.join(section.model_fields)}."
    if details["type"] == "value_error":
        reason = str(details["ctx"]["error"])
        if not key or reason.startswith(key + "."):
            return reason  # it names its own keys
        value = "" if section is not None else f"={_found(parts, data)}"
        return f"{key}{value}: {reason}{'' if reason.endswith(('.', '?')) else '.'}"
    return f"{key}={_found(parts, data)}: must be {allowed}."


def _unknown_key(key: str) -> str:
    if key in _OLD_KEYS:
        return f"{key} is not known: write {_OLD_KEYS[key]!r}."
    near = _nearest(key)
    section, _, _ = key.rpartition(".")
    siblings = [known.rpartition(".")[2] for known in _keys(ExperimentConfig) if known.rpartition(".")[0] == section]
    allowed = siblings if section else list(ExperimentConfig.model_fields)
    hint = f" Did you mean {near!r}?" if near else ""
    return f"{key} is not known.{hint} Keys {f'of {section}' if section else 'here'}: {', '.join(allowed)}."


def _nearest(key: str) -> str | None:
    """The same name in another section, else the nearest name in this section, else the nearest anywhere."""
    section, _, name = key.rpartition(".")
    last = {known.rpartition(".")[2]: known for known in reversed(all_keys())}
    if name in last:
        return last[name]
    siblings = [known for known in all_keys() if known.rpartition(".")[0] == section]
    for names in ({known.rpartition(".")[2]: known for known in siblings}, last):
        near = difflib.get_close_matches(name, list(names), n=1)
        if near:
            return names[near[0]]
    return None


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        section = _section(field)
        yield f"{prefix}{name}"
        if section is not None:
            yield from _keys(section, f"{prefix}{name}.")


def _section(field: FieldInfo | None) -> type[BaseModel] | None:
    """The section that a field holds, holds a list of, or may hold."""
    kind = field.annotation if field else ExperimentConfig
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
    if get_origin(kind) is UnionType:
        kind = next((member for member in get_args(kind) if _is_section(member)), None)
    return kind if _is_section(kind) else None


def _is_section(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _known_part(location: Sequence[int | str]) -> tuple[list[int | str], FieldInfo | None]:
    """The part of a location that names keys of the file and their places in lists of sections.

    A union's members and other lists' indexes come after it.
    """
    model: type[BaseModel] | None = ExperimentConfig
    parts: list[int | str] = []
    field: FieldInfo | None = None
    for part in location:
        if model is not None and isinstance(part, int):
            parts.append(part)
            continue
        if model is None or part not in model.model_fields:
            break
        field = model.model_fields[str(part)]
        parts.append(str(part))
        model = _section(field)
    return parts, field


def _found(parts: Sequence[int | str], data: Any) -> str:
    for part in parts:
        if isinstance(part, int):
            data = data[part] if isinstance(data, list) else data  # one section stands for a list of one
        else:
            data = data.get(part) if isinstance(data, Mapping) else None
    text = "null" if data is None else str(data).lower() if isinstance(data, bool) else repr(data)
    return text if len(text) <= 80 else f"{text[:77]}..."
