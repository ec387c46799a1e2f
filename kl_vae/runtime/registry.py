"""Registries of names in configs and their constructors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Constructor = TypeVar("Constructor", bound=Callable[..., Any])


class Registry:
    """A table from names to constructors, to which users add their own.

    `key` is the config key that selects from the table; errors name it.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._constructors: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[Constructor], Constructor]:
        """Return a decorator that registers a class or function under `name`.

        Raises:
            ValueError: the name is already registered.
        """

        def enter(constructor: Constructor) -> Constructor:
            taken = self._constructors.get(name)
            if taken is not None and taken is not constructor:
                raise ValueError(f"{self.key}={name!r}: already registered; choose another name")
            self._constructors[name] = constructor
            return constructor

        return enter

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """Return the constructor under `name`; ValueError: the name is unknown."""
        try:
            return self._constructors[name]
        except KeyError:
            raise ValueError(
                f"{self.key}={name!r}: unknown; choose one of {', '.join(self)}, "
                "or register your own first"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._constructors

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._constructors))
