"""F1 of named entities, as in the CoNLL-2003 evaluation: an entity is right when its type and both ends are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_TAG = re.compile(r"O|[BI]-.+")


def are_entity_tags(labels: Sequence[str]) -> bool:
    """Whether these class names mark entities: `O`, and `B-` or `I-` with a type."""
    return any(label != "O" for label in labels) and all(_TAG.fullmatch(label) for label in labels)


def entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(type, first, one past the last) of each entity. An `I-` that goes on with nothing of its type begins one."""
    begun, kind = 0, ""
    for position, tag in enumerate([*tags, "O"]):
        goes_on = tag == f"I-{kind}"
        if kind and not goes_on:
            yield kind, begun, position
        if not goes_on:
            begun, kind = position, "" if tag == "O" else tag[2:]


def entity_f1(predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> float:
    """F1 over all sentences' entities; 0 where there are none."""
    found, true = (
        {(sentence, *entity) for sentence, tags in enumerate(sentences) for entity in entities(tags)}
        for sentences in (predicted, truth)
    )
    return 2 * len(found & true) / max(1, len(found) + len(true))
