"""Build frozen dataclasses from plain values, and report all errors at once."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")

# PyYAML reads numbers without a point or a sign of the exponent as text: 1e-4, 1.5e3, 5E3
_NUMBER_AS_TEXT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def from_mapping(cls: type[Config], mapping: object, path: str = "") -> Config:
    """Build the dataclass `cls` from `mapping`; nested dataclasses are built from nested mappings.

    Args:
        cls: a frozen dataclass that checks its values in `__post_init__`.
        mapping: its fields by name.
        path: key path of the mapping, such as `model.params`, which starts each error.

    Raises:
        ValueError: unknown or missing keys, wrong types and impossible values, one line each, each
            with its full key path, the value and how to fix it.
    """
    errors = _Errors(cls, path)
    config = _build(cls, plain(mapping, path), path, errors)
    if errors:
        raise ValueError("\n".join(errors))
    return config  # type: ignore[no-any-return]


def from_arguments(cls: type[Config], *args: object, **kwargs: object) -> Config:
    """Build the dataclass `cls` from the arguments of a call, checked as by `from_mapping`.

    Raises:
        TypeError: arguments that `cls(*args, **kwargs)` would not take, or missing ones.
        ValueError: as `from_mapping`.
    """
    return from_mapping(cls, inspect.signature(cls).bind(*args, **kwargs).arguments)


def plain(value: Any, path: str = "") -> Any:
    """Return nested mappings and sequences as dicts and lists; other values and tuples stay.

    Mappings are read key by key, so that an OmegaConf object resolves its own interpolations.

    Raises:
        ValueError: the object cannot give the value of a key.
    """
    if isinstance(value, Mapping):
        return {key: plain(_item(value, key, path), _join(path, key)) for key in value}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, tuple)):
        return [plain(_item(value, i, path), _join(path, i)) for i in range(len(value))]
    return value


def _item(container: Any, key: Any, path: str) -> Any:
    try:
        return container[key]
    except Exception as error:  # each config library has its own
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{_join(path, key)}: has no value ({text}); set it") from None


def suggest(name: object, known: Iterable[str], otherwise: str = "choose one of") -> str:
    """Return the fix for an unknown name: the closest known one, else all of them."""
    known = list(known)
    close = _closest(str(name), known)
    return f"did you mean {close}?" if close else f"{otherwise} {', '.join(known)}"


def _closest(name: str, known: Iterable[str]) -> str | None:
    """Return the name that is spelled alike; one that contains `name`, if there is one."""
    known = list(known)
    longer = [other for other in known if len(name) > 3 and name in other]
    close = difflib.get_close_matches(name, longer, n=1, cutoff=0.0)
    return next(iter(close or difflib.get_close_matches(name, known, n=1)), None)


def show(value: object) -> str:
    """Return a value as text for an error message: one line, shortened."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def printable(text: str) -> str:
    """Return text on one line, with escapes for characters that are not printable."""
    if text.isprintable():
        return text
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)


class _Errors(list[str]):
    """The errors of a mapping from which a `cls` is built, one line each."""

    def __init__(self, cls: Any, path: str) -> None:
        super().__init__()
        self._places: dict[str, list[str]] = {}  # the paths of all keys, by their last part
        for place in _key_paths(cls, path):
            self._places.setdefault(place.rpartition(".")[2], []).append(place)

    def add_unknown(self, path: str, key: object, value: object, known: Iterable[str]) -> None:
        """Add an unknown key: it belongs elsewhere, or is close to a name here, or elsewhere."""
        name, hint = str(key), suggest(key, known, "known keys are")
        if name not in self._places and _closest(name, known) is None:
            name = _closest(name, self._places) or name
        if name in self._places:
            hint = f"did you mean {' or '.join(self._places[name])}?"
        self.append(f"{_join(path, key)}={show(value)}: unknown key; {hint}")


def _key_paths(cls: Any, path: str) -> Iterator[str]:
    """Yield the path of each key of nested dataclasses."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        place = _join(path, field.name)
        yield place
        for option in _options(hints[field.name]):
            if dataclasses.is_dataclass(option):
                yield from _key_paths(option, place)


def _build(cls: Any, mapping: object, path: str, errors: _Errors) -> Any:
    if isinstance(mapping, cls):
        return mapping
    if not isinstance(mapping, Mapping):
        where = path or cls.__name__
        errors.append(f"{where}={show(mapping)}: expected keys and values, such as {_example(cls)}")
        return None
    before = len(errors)
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in mapping:
        if key not in fields:
            errors.add_unknown(path, key, mapping[key], fields)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _convert(hints[name], mapping[name], _join(path, name), errors)
        elif field.default is field.default_factory is dataclasses.MISSING:
            errors.append(f"{_join(path, name)}: required, but missing")
    if len(errors) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        errors.extend(_join(path, line) for line in str(error).splitlines())
        return None


def _convert(hint: Any, value: object, path: str, errors: _Errors) -> Any:
    """Return `value` as the type `hint` asks, or append to `errors`."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path, errors)
    before = len(errors)
    if isinstance(value, str):
        value = _read_number(value, _options(hint))
    for option in _options(hint):
        if option is type(None) and value is None:
            return None
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return _build(option, value, path, errors)
        if get_origin(option) is Literal and any(
            value == choice and type(value) is type(choice) for choice in get_args(option)
        ):
            return value
        if get_origin(option) is tuple and isinstance(value, (list, tuple)):
            inner, *_ = get_args(option)
            items = tuple(_convert(inner, x, f"{path}[{i}]", errors) for i, x in enumerate(value))
            return items if len(errors) == before else None
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            if _is_finite(value):
                return float(value)
        elif option is Any or (isinstance(option, type) and _is_exactly(value, option)):
            return value
        elif get_origin(option) is Callable and callable(value):
            return value
        elif get_origin(option) is dict and isinstance(value, Mapping):
            return _read_numbers(value)
    errors.append(f"{path}={show(value)}: is {_type_name(type(value))}, expected {_expected(hint)}")
    return None


def _is_exactly(value: object, kind: type) -> bool:
    """Return whether `value` is of type `kind`; a bool is no int, but a PosixPath is a Path."""
    return type(value) is kind or (kind is Path and isinstance(value, Path))


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond 1e308
        return False


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _read_number(text: str, options: tuple[Any, ...] = (float,)) -> object:
    """Return the number that a text such as 1e-4 means, where `options` takes one; else the text.

    A key that takes text keeps it.
    """
    if str in options or not _NUMBER_AS_TEXT.fullmatch(text):
        return text
    number = float(text)
    if float in options:
        return number
    return int(number) if int in options and number.is_integer() else text


def _read_numbers(value: Any) -> Any:
    """Read numbers as `_read_number` does in keys and values without a type of their own."""
    if isinstance(value, Mapping):
        return {key: _read_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_read_numbers(inner) for inner in value]
    return _read_number(value) if isinstance(value, str) else value


def _type_name(kind: type) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    names |= {list: "a list", tuple: "a list", dict: "keys and values", type(None): "null"}
    names |= {Path: "a path"}
    return names.get(kind, kind.__name__)


def _expected(hint: Any) -> str:
    names = []
    for option in _options(hint):
        if get_origin(option) is Literal:
            names.append("one of " + ", ".join(str(choice) for choice in get_args(option)))
        elif get_origin(option) is tuple:
            names.append(f"a list, each item {_expected(get_args(option)[0])}")
        elif get_origin(option) is Callable:
            names.append("a callable")
        elif option is float:
            names.append("a finite number")
        else:
            names.append(_type_name(get_origin(option) or option))
    return " or ".join(names)


def _join(path: str, key: object) -> str:
    return printable(f"{path}.{key}" if path else str(key))


def _example(cls: Any) -> str:
    return f"{dataclasses.fields(cls)[0].name}: ..."
