"""Experiment folders for the report, and the page as a tree that tests can ask."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from fish_tuning.experiments.records.run_record import RunRecord

VOID = ("meta", "link", "br", "hr", "img", "input")


@dataclass
class Node:
    tag: str
    attributes: dict[str, str]
    children: list[Node | str] = field(default_factory=list)

    def all(self, tag: str, **attributes: str) -> list[Node]:
        """All elements below with this tag; `class_="a"` matches any of the classes."""
        return [node for node in self._below() if node.tag == tag and node._has(attributes)]

    def one(self, tag: str, **attributes: str) -> Node:
        (found,) = self.all(tag, **attributes)
        return found

    @property
    def text(self) -> str:
        parts = (child if isinstance(child, str) else child.text for child in self.children)
        return " ".join(" ".join(parts).split())

    def _below(self) -> Iterator[Node]:
        for child in self.children:
            if isinstance(child, Node):
                yield child
                yield from child._below()

    def _has(self, wanted: dict[str, str]) -> bool:
        return all(
            value in self.attributes.get(name.rstrip("_"), "").split()
            if name == "class_"
            else self.attributes.get(name.rstrip("_")) == value
            for name, value in wanted.items()
        )


class _Parser(HTMLParser):
    """A strict one: every element is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Node("root", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(page: str) -> Node:
    parser = _Parser()
    parser.feed(page)
    parser.close()
    assert parser.open == [parser.root], f"<{parser.open[-1].tag}> is not closed"
    return parser.root


def config(name: str, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    return {
        "name": name,
        "model": {"name": "org/tiny"},
        "dataset": {"load_args": [name]},
        "seeds": list(seeds),
        "fish_tuning": {"methods_to_run": list(arms)},
    }


def write_experiment(
    folder: Path, runs: Sequence[RunRecord], *, settings: dict[str, Any] | None = None, **facts: Any
) -> Path:
    """`runs/*.json`, and results.json where there are `settings`."""
    (folder / "runs").mkdir(parents=True)
    for run in runs:
        (folder / "runs" / f"{run.arm}-seed{run.seed}.json").write_text(json.dumps(run.to_dict()))
    if settings is not None:
        data = {"experiment": settings["name"], "config": settings, "facts": facts}
        data["runs"] = [run.to_dict() for run in runs]
        (folder / "results.json").write_text(json.dumps(data))
    return folder
