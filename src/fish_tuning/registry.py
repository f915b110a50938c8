"""Things by name: code registers them, arguments and experiment files name them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from fish_tuning.errors import ConfigurationError, did_you_mean

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """A mapping that is added to by name, and whose lists in error messages are its own.

    Args:
        what: what its members are called in messages, such as "selection".

    Example:
        >>> from fish_tuning.registry import Registry
        >>> greetings = Registry("greeting")
        >>> @greetings.register("plain")
        ... def plain(name):
        ...     return f"Hello, {name}"
        >>> greetings.find("plain")("you")
        'Hello, you'
        >>> sorted(greetings)
        ['plain']
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._members: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: from here on `name` is the decorated member, in the place of one that had the name before."""

        def add(member: T) -> T:
            self._members[name] = member
            return member

        return add

    def find(self, name: str, asked: str | None = None, error: type[Exception] = ConfigurationError) -> T:
        """The member of that name; raises `error`, which begins with `asked` (the key or argument), where none is."""
        if name in self._members:
            return self._members[name]
        raise error(
            f"{asked or self.what}={name!r} is not known; allowed are {', '.join(map(repr, self._members))}."
            f"{did_you_mean(name, self._members)}"
        )

    def __getitem__(self, name: str) -> T:
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)
