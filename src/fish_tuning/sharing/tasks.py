"""What a model of transformers is for, in the names of PEFT and of the hub; found by the model's class."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers.models.auto import modeling_auto


class TaskKind(NamedTuple):
    """PEFT's `task_type` (None where PEFT has none) and the hub's `pipeline_tag`."""

    task_type: str | None
    pipeline_tag: str


# By transformers' tables of classes; the first that holds a class tells.
_KINDS = {
    "SEQUENCE_CLASSIFICATION": TaskKind("SEQ_CLS", "text-classification"),
    "TOKEN_CLASSIFICATION": TaskKind("TOKEN_CLS", "token-classification"),
    "QUESTION_ANSWERING": TaskKind("QUESTION_ANS", "question-answering"),
    "CAUSAL_LM": TaskKind("CAUSAL_LM", "text-generation"),
    "SEQ_TO_SEQ_CAUSAL_LM": TaskKind("SEQ_2_SEQ_LM", "text2text-generation"),
    "IMAGE_CLASSIFICATION": TaskKind(None, "image-classification"),
    "AUDIO_CLASSIFICATION": TaskKind(None, "audio-classification"),
}
# Modules that PEFT's model of a task type trains as a whole, by the ends of their names, whether or not it is asked to.
_OWN_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def task_kind(base: Any) -> TaskKind | None:
    """What the model `base` is for; None where none of the tables has its class."""
    names = {kind.__name__ for kind in type(base).__mro__}
    for table, kind in _KINDS.items():
        classes = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}).values()
        if names & {name for found in classes for name in ([found] if isinstance(found, str) else found)}:
            return kind
    return None


def task_type(base: Any, config: Any) -> str | None:
    """The task type of an adapter with this configuration; the one it was given, else the one that changes nothing.

    With a task type PEFT trains a classifier as a whole, and saves it. An adapter that was made without one and leaves
    the classifier as it was would become another when it is loaded, so it goes without.
    """
    if config.task_type is not None:
        return str(getattr(config.task_type, "value", config.task_type))
    kind = task_kind(base)
    if kind is None or kind.task_type is None:
        return None
    saved = tuple(getattr(config, "modules_to_save", None) or ())
    ends = _OWN_HEADS.get(kind.task_type, ())
    heads = [name for name, _ in base.named_modules() if name.endswith(ends)] if ends else []
    return kind.task_type if all(_is_below(name, saved) for name in heads) else None


def _is_below(name: str, saved: tuple[str, ...]) -> bool:
    """Whether the module `name`, or one that holds it, is trained as a whole."""
    parts = name.split(".")
    return any(".".join(parts[:depth]).endswith(end) for depth in range(1, len(parts) + 1) for end in saved)
