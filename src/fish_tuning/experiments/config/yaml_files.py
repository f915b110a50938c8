"""YAML as people expect it: `1e-4` is a number, `no` is a word, and a key that stands twice is an error."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from fish_tuning.errors import ConfigurationError

_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_CORE = "tag:yaml.org,2002:"
_KINDS = {
    **{"str": "a text", "int": "a whole number", "float": "a number", "bool": "true or false", "null": "null"},
    **{"map": "keys and values", "seq": "a list", "merge": "a merge key"},
}
_REPLACED = (f"{_CORE}float", f"{_CORE}bool")
_LEFT_OUT = (f"{_CORE}timestamp", f"{_CORE}value", f"{_CORE}int")  # dates are texts, and so is "="
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")  # 010 is ten, and 1:30 a text

# A file that is passed on must not be able to fill the memory or to keep the reader busy.
MOST_BYTES = 2**18
MOST_NODES = 20_000  # with every alias written out
MOST_DEPTH = 32


class _Loader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1; this reads floats, truth values and dates as YAML 1.2 has them.

    It refuses repeated keys, tags that are not of JSON's kinds, and scalars that are not what their tag says.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                raise _refused(f"the key {shortened(key)!r} stands twice", key_node)
            seen.add(key)
        made = super().construct_mapping(node, deep)
        return {str(key): value for key, value in made.items()}

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = node.tag.removeprefix(_CORE)
        if kind not in _KINDS:
            raise _refused(f"the tag {shortened(node.tag)!r} is not read here", node)
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and abs(value) >= 2**64:
                raise ValueError
            return value
        except (ValueError, KeyError, AttributeError, OverflowError) as error:
            raise _refused(f"{shortened(node.value)!r} cannot be read as {_KINDS[kind]}", node) from error


def _refused(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _whole_number(text: str) -> int:
    base = {"0x": 16, "0o": 8}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


def shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


_Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] not in (*_REPLACED, *_LEFT_OUT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_CORE}int", _INT, list("-+0123456789"))
_Loader.add_constructor(f"{_CORE}int", lambda _, node: _whole_number(str(node.value)))
_Loader.add_implicit_resolver(_REPLACED[0], _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver(_REPLACED[1], _BOOL, list("tTfF"))


def read_mapping(path: Path) -> dict[str, Any]:
    """The file's keys and values; an empty file has none. Raises ConfigurationError with line and column."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    content = parse(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"{path} must hold keys and values (model:, dataset:, ...), not {type(content).__name__}."
        )
    return content


def parse(text: str, source: str) -> Any:
    """The value a YAML text stands for: texts, numbers, truth values, null, lists, and mappings with texts as keys.

    Raises ConfigurationError that names `source`, line and column, also for what is larger than a configuration ever
    is: more than 256 KiB, nested deeper than 32, or more than 20,000 values once all aliases are written out.
    """
    if len(text) > MOST_BYTES or len(text.encode("utf-8", "replace")) > MOST_BYTES:
        raise ConfigurationError(f"{source} is longer than the {MOST_BYTES // 1024} KiB that are read.")
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            return None
        _check_size(node)
        loader = _Loader("")
        try:
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{source}{_reason(error)}") from None  # its cause quotes lines, maybe with a secret
    except RecursionError as error:
        raise ConfigurationError(f"{source} is nested deeper than {MOST_DEPTH}.") from error
    except (ValueError, OverflowError) as error:  # PyYAML's own, of escapes and directives with senseless numbers
        raise ConfigurationError(f"{source} is no YAML: {error}.") from error


def _check_size(root: yaml.Node) -> None:
    """Refuse values that hold themselves, and more of them, or deeper ones, than a configuration has."""
    sizes: dict[int, tuple[int, int]] = {}  # of each node, with its aliases written out: values and depth
    open_nodes: set[int] = set()

    def measure(node: yaml.Node) -> tuple[int, int]:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            raise _refused("a value that holds itself", node)
        open_nodes.add(id(node))
        if len(open_nodes) > MOST_DEPTH:
            raise _refused(f"nested deeper than {MOST_DEPTH}", node)
        inner = [measure(child) for child in _children(node)]
        open_nodes.discard(id(node))
        sizes[id(node)] = 1 + sum(size for size, _ in inner), 1 + max((depth for _, depth in inner), default=0)
        if sizes[id(node)][0] > MOST_NODES:
            raise _refused(f"more than {MOST_NODES:,} values", node)
        if sizes[id(node)][1] > MOST_DEPTH:
            raise _refused(f"nested deeper than {MOST_DEPTH}", node)
        return sizes[id(node)]

    measure(root)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused("a key that is no text", key)
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark, problem = error.problem_mark, str(error.problem)
        if problem.startswith("but "):  # "expected a single document", "but found another document"
            problem = f"{error.context}, {problem}"
        return f", line {mark.line + 1}, column {mark.column + 1}: {problem}."
    return f": {str(error).splitlines()[0]}."
