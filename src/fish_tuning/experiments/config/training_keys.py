"""Which names `training.args_override` may hold, found out without importing torch."""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fish_tuning.errors import did_you_mean

# What users still write, and where it went. Only told of when this transformers knows the new name.
OLD_NAMES = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "adafactor": "optim",
    "group_by_length": "train_sampling_strategy",
    "include_inputs_for_metrics": "include_for_metrics",
}
_REMARKS = {
    "warmup_ratio": "where a value below 1 is a share of all steps",
    "adafactor": "with the value 'adafactor'",
    "group_by_length": "with the value 'group_by_length'",
}

# What the runner sets itself, and the key that decides it.
OWNED = {
    "output_dir": "training.output_dir sets the folder",
    "seed": "'seeds' lists the seeds",
    "data_seed": "'seeds' lists the seeds, and all arms of a seed share the data order",
    "disable_tqdm": "the runner shows one progress bar for all runs",
    "tokenizer": "the runner gives the Trainer the model's tokenizer (today's name for it is processing_class)",
    "processing_class": "the runner gives the Trainer the model's tokenizer",
    "torch_dtype": "model.dtype sets it",
    "dtype": "model.dtype sets it",
    "max_seq_length": "training.max_seq_length sets it",
}

_NUMBERS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "None": (type(None),)}
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "None": "null"}


@functools.cache
def training_argument_types() -> Mapping[str, str]:
    """Fields of the installed `TrainingArguments` with their annotations; empty when its source cannot be found.

    Read from the source, because importing the class takes seconds and a mistyped key should be told at once.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return {}
    source = Path(spec.origin).with_name("training_args.py")
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except OSError:
        return {}
    return {
        field.target.id: ast.unparse(field.annotation)
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def training_argument_problems(arguments: Mapping[str, Any]) -> list[str]:
    """What is wrong with each name and value, one line each; no line when all is well."""
    types = training_argument_types()
    problems = (_problem(name, value, types) for name, value in arguments.items())
    return [problem for problem in problems if problem]


def _problem(name: str, value: Any, types: Mapping[str, str]) -> str:
    key = f"training.args_override.{name}"
    if name in OWNED:
        return f"{key} cannot be set: {OWNED[name]}."
    if OLD_NAMES.get(name) in types:
        remark = f", {_REMARKS[name]}" if name in _REMARKS else ""
        return f"{key} is an old name: write {OLD_NAMES[name]!r}{remark}."
    if types and name not in types:
        return f"{key} is no name of transformers' TrainingArguments.{did_you_mean(name, types)}"
    kinds = types.get(name, "").split(" | ")
    if not set(kinds) <= _NUMBERS.keys():
        return ""  # strings and structures: TrainingArguments checks them itself
    wanted = {kind for known in kinds for kind in _NUMBERS[known]}
    finite = not isinstance(value, float) or math.isfinite(value)
    if type(value) in wanted and finite:  # exact, because Python counts True among the whole numbers
        return ""
    return f"{key}={value!r}: must be {' or '.join(_WORDS[kind] for kind in kinds)}."
